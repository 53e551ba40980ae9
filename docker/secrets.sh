#!/bin/sh
# make secrets [FOLDER]: create the secrets that do not exist yet, and say which. No file is ever changed or deleted, also an
# empty one. Only this user can open the folder; its files are readable by all, because containers mount single files and
# run as other users.
set -eu
case ${1:-/} in /*) folder=${1:-.secrets} ;; *) folder=$PWD/$1 ;; esac
cd "$(dirname "$0")/.."
for tool in head od tr base64; do
    command -v "$tool" > /dev/null || { echo "error: make secrets needs the command $tool" >&2; exit 1; }
done
umask 077
mkdir -p "$folder"
chmod 700 "$folder"

# One at a time: two would each make half of the pair of keys below.
lock=$folder/.lock tries=0
until mkdir "$lock" 2> /dev/null; do
    tries=$((tries + 1))
    if [ "$tries" -gt 10 ] || ! [ -w "$folder" ]; then
        echo "error: $lock cannot be made. If the folder is writable, and no other make secrets runs: rmdir '$lock'" >&2
        exit 1
    fi
    sleep 1
done
trap 'rm -f "$folder/.new"; rmdir "$lock"' EXIT
trap 'exit 1' HUP INT TERM

random() { head -c "$1" /dev/urandom | od -An -v -tx1 | tr -d ' \n'; }
url_safe() { head -c "$1" /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'; }
there() { [ -e "$folder/$1" ] || [ -L "$folder/$1" ]; }
keep() { # NAME < content
    if there "$1"; then
        echo "kept     $folder/$1 (was there)"
        [ -s "$folder/$1" ] || echo "         but it is empty: delete it to have it created" >&2
        return
    fi
    cat > "$folder/.new"
    chmod 644 "$folder/.new"
    mv "$folder/.new" "$folder/$1"
    echo "created  $folder/$1"
}

random 32 | keep ray_token
random 16 | keep grafana_password
printf 'gm_%s_%s\n' "$(random 4)" "$(url_safe 32)" | keep api_key
# s3_credentials is the clients' key, s3.json the list of keys of the store that compose and the dev overlay start. Both have the
# same key, so they are created together or not at all: one alone is the user's, with a key that is not known here.
if there s3_credentials && ! there s3.json; then
    echo "kept     $folder/s3_credentials (was there); no s3.json is created: that is for a store that the platform starts itself, with a pair of keys"
elif there s3.json && ! there s3_credentials; then
    echo "kept     $folder/s3.json (was there); put one of its keys into $folder/s3_credentials" >&2
else
    access=$(random 10) secret=$(random 32)
    # s3.json first: after an interruption it is kept, and its line above says what to do
    printf '{"identities": [{"name": "genmodels", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}\n' \
        "$access" "$secret" | keep s3.json
    printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$access" "$secret" | keep s3_credentials
fi

# SELinux lets containers read only files with this label; a secret's mount cannot ask for it, as `:z` of a volume can.
if selinuxenabled 2> /dev/null; then chcon -R -t container_file_t "$folder"; fi
# None, e.g. for Kubernetes, is no reason to warn. Which versions read compose.yaml: docs/compose.md.
case $(docker compose version --short 2> /dev/null | sed 's/^v//') in
    2.1[0-6].* | 2.[0-9].* | 2.30.[01])
        echo "This docker compose cannot read compose.yaml: install 2.17 or newer, but not 2.30.0 or 2.30.1" >&2 ;;
esac
if [ $# -eq 0 ] && [ -n "$(tail -c 1 .env 2> /dev/null)" ]; then echo >> .env; fi # its last line has no end
[ $# -gt 0 ] || grep -qs '^GENMODELS_SECRETS=' .env || echo "GENMODELS_SECRETS=./$folder" >> .env
echo "Secrets are in $folder; the first key: export GENMODELS_KEY=\$(cat '$folder/api_key')"
