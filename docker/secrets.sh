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
[ $# -gt 0 ] || grep -qs '^GENMODELS_SECRETS=' .env || echo "GENMODELS_SECRETS=./$folder" >> .env
echo "Secrets are in $folder; the first key: export GENMODELS_KEY=\$(cat $folder/api_key)"
