#!/bin/sh
# make secrets [FOLDER]: create the secrets that do not exist yet; never overwrite one. Only this user can open the folder;
# its files are readable by all, because containers mount single files and run as other users.
set -eu
cd "$(dirname "$0")/.."
folder=${1:-.secrets}
umask 077
mkdir -p "$folder"

random() { head -c "$1" /dev/urandom | od -An -v -tx1 | tr -d ' \n'; }
url_safe() { head -c "$1" /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'; }
keep() {
    [ -s "$folder/$1" ] || { cat > "$folder/.new" && chmod 644 "$folder/.new" && mv "$folder/.new" "$folder/$1"; }
}

random 32 | keep ray_token
random 16 | keep grafana_password
printf 'gm_%s_%s\n' "$(random 4)" "$(url_safe 32)" | keep api_key
# The store and its clients must have the same key, so both files are created together.
if ! { [ -s "$folder/s3_credentials" ] && [ -s "$folder/s3.json" ]; }; then
    rm -f "$folder/s3_credentials" "$folder/s3.json"
    access=$(random 10) secret=$(random 32)
    printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$access" "$secret" | keep s3_credentials
    printf '{"identities": [{"name": "genmodels", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}\n' \
        "$access" "$secret" | keep s3.json
fi

# SELinux lets containers read only files with this label; a secret's mount cannot ask for it, as `:z` of a volume can.
if selinuxenabled 2> /dev/null; then chcon -R -t container_file_t "$folder"; fi
# None, e.g. for Kubernetes, is no reason to warn. Which versions read compose.yaml: docs/compose.md.
case $(docker compose version --short 2> /dev/null | sed 's/^v//') in
    2.1[0-6].* | 2.[0-9].* | 2.30.[01])
        echo "This docker compose cannot read compose.yaml: install 2.17 or newer, but not 2.30.0 or 2.30.1" >&2 ;;
esac
[ $# -gt 0 ] || grep -qs '^GENMODELS_SECRETS=' .env || echo "GENMODELS_SECRETS=./$folder" >> .env
echo "Secrets are in $folder; the first key: export GENMODELS_KEY=\$(cat $folder/api_key)"
