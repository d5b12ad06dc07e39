#!/bin/sh
# Proves that grpcurl, knowing nothing but the address, finds the contract by reflection and can use all of it.
#
# tests/clients/grpcurl.sh GRPCURL ADDRESS ADMIN-ADDRESS
set -eu
grpcurl=$1 address=$2 admin=$3

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# call METHOD JSON: the answer on one line, without spaces.
call() {
    "$grpcurl" -plaintext -max-time 20 -d "$2" "$address" "$1" | tr -d ' \n'
}

# expect TEXT ANSWER
expect() {
    case $2 in *"$1"*) echo "ok: $1" ;; *) fail "expected $1 in: $2" ;; esac
}

# refuse CODE TEXT METHOD JSON: the call fails with the code, and says the text.
refuse() {
    if answer=$("$grpcurl" -plaintext -max-time 20 -d "$4" "$address" "$3" 2>&1); then
        fail "$3 $4 should be refused, got: $answer"
    fi
    expect "Code: $1" "$answer"
    expect "$2" "$answer"
}

gateway=tidegate.v1.Gateway
encoded() { printf '%s' "$1" | base64; }

services=$("$grpcurl" -plaintext "$address" list)
expect "$gateway" "$services"
expect grpc.health.v1.Health "$services"
expect grpc.reflection.v1.ServerReflection "$services"
methods=$("$grpcurl" -plaintext "$address" list $gateway)
for method in Get Put Delete BatchGet BatchWrite WriteStream Scan Touch Increment AwaitPersisted Watch; do
    expect "$gateway.$method" "$methods"
done
expect 'rpc Put ( .tidegate.v1.PutRequest )' "$("$grpcurl" -plaintext "$address" describe $gateway)"
expect 'google.protobuf.Duration ttl' "$("$grpcurl" -plaintext "$address" describe tidegate.v1.PutRequest)"

expect '"status":"SERVING"' "$(call grpc.health.v1.Health/Check '{}')"
expect '"status":"SERVING"' "$(call grpc.health.v1.Health/Check "{\"service\":\"$gateway\"}")"
expect '"status":"SERVING"' "$(call grpc.health.v1.Health/Check '{"service":"tidegate.store"}')"
refuse NotFound service grpc.health.v1.Health/Check '{"service":"nobody"}'

for mode in WRITE_MODE_THROUGH WRITE_MODE_BEHIND WRITE_MODE_UNSPECIFIED; do
    case $mode in WRITE_MODE_BEHIND) durability=DURABILITY_JOURNAL ;; *) durability=DURABILITY_STORE ;; esac
    key="\"namespace\":\"grpcurl\",\"key\":\"$mode\""
    value=$(encoded "value of $mode")
    expect "\"durability\":\"$durability\"" "$(call $gateway/Put "{$key,\"value\":\"$value\",\"write_mode\":\"$mode\"}")"
    for consistency in READ_CONSISTENCY_CACHED READ_CONSISTENCY_SHARED READ_CONSISTENCY_STORE; do
        expect "\"value\":\"$value\"" "$(call $gateway/Get "{$key,\"consistency\":\"$consistency\"}")"
    done
    expect "\"durability\":\"$durability\"" "$(call $gateway/Delete "{$key,\"write_mode\":\"$mode\"}")"
    answer=$(call $gateway/Get "{$key}")
    expect '"source":"SOURCE_' "$answer"
    case $answer in *'"entry"'*) fail "deleted and still there: $answer" ;; esac
done

key='"namespace":"grpcurl","key":"brief"'
call $gateway/Put "{$key,\"ttl\":\"3600s\"}" >/dev/null
expect '"expireTime":"20' "$(call $gateway/Get "{$key}")"

# What the store decides, and what is written once.
call $gateway/Put "{$key,\"value\":\"dg==\"}" >/dev/null
refuse Aborted '"reason": "CONFLICT"' $gateway/Put "{$key,\"condition\":{\"existence\":\"EXISTENCE_ABSENT\"}}"
refuse Aborted '"standing_version": "' $gateway/Put "{$key,\"condition\":{\"existence\":\"EXISTENCE_ABSENT\"}}"
refuse FailedPrecondition '"reason": "ABSENT"' $gateway/Touch '{"namespace":"grpcurl","key":"nothing"}'
expect '"expireTime":"20' "$(call $gateway/Touch "{$key,\"ttl\":\"3600s\"}")"
count='{"namespace":"grpcurl","key":"counter","delta":5,"request_id":"first"}'
expect '"value":"5"' "$(call $gateway/Increment "$count")"
expect '"deduplicated":true' "$(call $gateway/Increment "$count")"
expect '"value":"6"' "$(call $gateway/Increment '{"namespace":"grpcurl","key":"counter"}')"
refuse FailedPrecondition '"reason": "NOT_A_COUNTER"' $gateway/Increment "{$key}"

# Several at once: in one message, and in a stream.
put() { printf '{"put":{"namespace":"grpcurl","key":"%s","value":"%s","write_mode":"WRITE_MODE_BEHIND"}}' "$1" "$(encoded "$1")"; }
answer=$(call $gateway/BatchWrite "{\"items\":[$(put batch:a),$(put batch:b),{\"delete\":{\"namespace\":\"grpcurl\"}}]}")
expect '"durability":"DURABILITY_JOURNAL"' "$answer"
expect '"field":"key"' "$answer"
answer=$(call $gateway/WriteStream "{\"item\":$(put batch:c)}{\"item\":$(put batch:d)}")
expect '{"number":"1","result":{"written":' "$answer"
expect '{"number":"2","result":{"written":' "$answer"
answer=$(call $gateway/BatchGet '{"namespace":"grpcurl","keys":["batch:a","batch:d","nothing"]}')
expect "\"value\":\"$(encoded batch:a)\"" "$answer"
expect "\"value\":\"$(encoded batch:d)\"" "$answer"
answer=$(call $gateway/Scan '{"namespace":"grpcurl","prefix":"batch:","page_size":3,"keys_only":true}')
for letter in a b c; do expect "\"key\":\"batch:$letter\"" "$answer"; done
token=$(printf '%s' "$answer" | sed -n 's/.*"nextPageToken":"\([^"]*\)".*/\1/p')
answer=$(call $gateway/Scan "{\"namespace\":\"grpcurl\",\"prefix\":\"batch:\",\"page_token\":\"$token\"}")
expect '{"records":[{"key":"batch:d",' "$answer"
refuse InvalidArgument '"field": "page_token"' $gateway/Scan "{\"namespace\":\"grpcurl\",\"page_token\":\"$token\"}"
call $gateway/AwaitPersisted '{}' >/dev/null
refuse FailedPrecondition '"reason": "TOO_NEW"' $gateway/AwaitPersisted "{$key,\"version\":\"9223372036854775807\"}"

# Error details arrive in a form that generic tools can read.
refuse InvalidArgument google.rpc.BadRequest $gateway/Put '{"namespace":"?","ttl":"-1s"}'
refuse InvalidArgument '"field": "ttl"' $gateway/Put '{"namespace":"?","ttl":"-1s"}'
refuse InvalidArgument '"field": "namespace"' $gateway/Get '{"namespace":"?","key":"k"}'
refuse InvalidArgument '"outcome": "not_applied"' $gateway/Delete '{"namespace":"n","key":""}'

# The operators' port describes itself, too, and each port its own service alone.
case $services in *tidegate.v1.Admin*) fail "the operators' service is listed at $address" ;; esac
address=$admin
services=$("$grpcurl" -plaintext "$address" list)
expect tidegate.v1.Admin "$services"
case $services in *$gateway*) fail "the gateway's service is listed at $address" ;; esac
expect '"status":"SERVING"' "$(call grpc.health.v1.Health/Check '{}')"
expect '"namespace":"grpcurl"' "$(call tidegate.v1.Admin/Stats '{}')"
refuse InvalidArgument '"field": "namespace"' tidegate.v1.Admin/Stats '{"namespace":"?"}'
expect '"keys":"2"' "$(call tidegate.v1.Admin/Invalidate '{"namespace":"grpcurl","keys":["brief","absent"]}')"
expect '"memoryCopies":"' "$(call tidegate.v1.Admin/Invalidate '{"namespace":"grpcurl","prefix":"WRITE_"}')"
refuse InvalidArgument '"field": "prefix"' tidegate.v1.Admin/Invalidate '{"namespace":"grpcurl","keys":["a"],"prefix":"b"}'
expect '"done":"1","total":"1"' "$(call tidegate.v1.Admin/Warm '{"namespace":"grpcurl","prefix":"brief"}')"
refuse InvalidArgument '"field": "newest"' tidegate.v1.Admin/Warm '{"namespace":"grpcurl","newest":100001}'
refuse Unimplemented 'no such service' $gateway/Get '{"namespace":"grpcurl","key":"k"}'
echo "grpcurl: all is well"
