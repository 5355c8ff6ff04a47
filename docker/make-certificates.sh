#!/usr/bin/env bash
# Certificates for RAY_USE_TLS=1: an authority of your own, and one certificate that all nodes of a cluster share.
#
#   make-certificates.sh DIR NAME_OR_ADDRESS ...
#
# gives DIR/ca.crt, node.crt and node.key, which every node needs, and ca.key, which no node needs: keep it at home.
# The names are all that nodes are reached by: their addresses, a VPN's too. 127.0.0.1 and localhost are in it anyway.
# Run again with more names, it keeps the authority and makes a new node.crt: nodes with the old one go on.
set -euo pipefail

case ${1:-} in
    "" | -h | --help)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
        [ -n "${1:-}" ] && exit 0 || exit 2
        ;;
esac
folder=$1 && shift
command -v openssl >/dev/null || { echo "make-certificates.sh: openssl is not installed" >&2 && exit 2; }

names=DNS:localhost,IP:127.0.0.1,IP:::1
for name in "$@"; do
    if [[ $name =~ ^[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+$ || $name =~ ^[0-9A-Fa-f]*:[0-9A-Fa-f:.]+$ ]]; then
        names+=,IP:$name
    elif [[ $name =~ ^[A-Za-z0-9*]([A-Za-z0-9.-]*[A-Za-z0-9])?$ ]]; then
        names+=,DNS:$name
    else
        echo "make-certificates.sh: $name is no name of a host and no address" >&2 && exit 2
    fi
done

umask 077 # keys are for the owner alone
mkdir -p "$folder" && cd "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
run() { "$@" 2>"$work/said" || { cat "$work/said" >&2 && exit 1; }; }

if [ ! -e ca.key ]; then
    run openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256 -days 3650 \
        -subj '/CN=diloco cluster authority' -addext basicConstraints=critical,CA:TRUE \
        -addext keyUsage=critical,keyCertSign,cRLSign -keyout ca.key -out ca.crt
fi
run openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256 -subj '/CN=diloco node' \
    -keyout "$work/node.key" -out "$work/node.csr"
printf '%s\n' "subjectAltName=$names" extendedKeyUsage=serverAuth,clientAuth basicConstraints=CA:FALSE \
    keyUsage=critical,digitalSignature >"$work/extensions"
run openssl x509 -req -sha256 -days 825 -in "$work/node.csr" -CA ca.crt -CAkey ca.key -CAcreateserial \
    -extfile "$work/extensions" -out "$work/node.crt"
mv "$work/node.key" "$work/node.crt" .
chmod 644 ca.crt node.crt
chmod 600 ca.key node.key

echo "in the environment of every node, of the driver and of what submits jobs:"
echo "  RAY_USE_TLS=1 RAY_TLS_CA_CERT=$PWD/ca.crt RAY_TLS_SERVER_CERT=$PWD/node.crt RAY_TLS_SERVER_KEY=$PWD/node.key"
