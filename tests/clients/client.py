"""Proves that stubs generated from the contract by grpcio-tools, on a client stack that is not ours, can use all of it.

client.py ADDRESS
"""

import importlib
import pathlib
import sys
import tempfile

import grpc
import grpc_tools
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT = 20


def generate(directory):
    """Generates the stubs into a directory and imports them."""
    included = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    arguments = [f"-I{ROOT / 'proto'}", f"-I{included}", f"--python_out={directory}", f"--grpc_python_out={directory}"]
    assert protoc.main(["protoc", *arguments, "tidegate/v1/gateway.proto"]) == 0, "protoc failed"
    sys.path.insert(0, directory)
    return (importlib.import_module(f"tidegate.v1.{name}") for name in ("gateway_pb2", "gateway_pb2_grpc"))


def refused(call, request, code):
    """The error details of a call that must be refused, by type."""
    try:
        answer = call(request, timeout=TIMEOUT)
    except grpc.RpcError as error:
        assert error.code() == code, error
        details = {}
        for packed in rpc_status.from_call(error).details:
            for kind in (error_details_pb2.BadRequest, error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo):
                if packed.Is(kind.DESCRIPTOR):
                    details[kind] = kind.FromString(packed.value)
        return details
    raise AssertionError(f"{request} should be refused, got {answer}")


def round_trips(pb, gateway):
    through, behind = pb.WRITE_MODE_THROUGH, pb.WRITE_MODE_BEHIND
    values = {"empty": b"", "bytes": bytes(range(256)), "large": b"x" * 1024 * 1024, "ключ 🔑": "значение".encode()}
    for mode, durability in ((through, pb.DURABILITY_STORE), (behind, pb.DURABILITY_JOURNAL)):
        last = 0
        for key, value in values.items():
            name = {"namespace": "python", "key": key}
            put = gateway.Put(pb.PutRequest(**name, value=value, write_mode=mode), timeout=TIMEOUT)
            assert put.durability == durability, put
            assert put.version > last, (put, last)
            last = put.version
            for consistency in (pb.READ_CONSISTENCY_CACHED, pb.READ_CONSISTENCY_SHARED, pb.READ_CONSISTENCY_STORE):
                got = gateway.Get(pb.GetRequest(**name, consistency=consistency), timeout=TIMEOUT)
                assert got.HasField("entry") and got.entry.value == value, (key, got.source)
                assert got.entry.version == put.version, (got.entry.version, put.version)
                assert not got.entry.HasField("expire_time"), got.entry.expire_time
            gateway.Delete(pb.DeleteRequest(**name, write_mode=mode), timeout=TIMEOUT)
            got = gateway.Get(pb.GetRequest(**name), timeout=TIMEOUT)
            assert not got.HasField("entry") and got.source != pb.SOURCE_UNSPECIFIED, got


def expiry(pb, gateway):
    name = {"namespace": "python", "key": "brief"}
    gateway.Put(pb.PutRequest(**name, value=b"v", ttl=duration_pb2.Duration(seconds=3600)), timeout=TIMEOUT)
    got = gateway.Get(pb.GetRequest(**name), timeout=TIMEOUT)
    assert got.entry.HasField("expire_time") and got.entry.expire_time.seconds > 1_700_000_000, got


def refusals(pb, gateway):
    bad = pb.PutRequest(namespace="?", write_mode=99, ttl=duration_pb2.Duration(seconds=-1))
    details = refused(gateway.Put, bad, grpc.StatusCode.INVALID_ARGUMENT)
    fields = {violation.field for violation in details[error_details_pb2.BadRequest].field_violations}
    assert fields == {"namespace", "key", "write_mode", "ttl"}, fields
    assert details[error_details_pb2.ErrorInfo].metadata["outcome"] == "not_applied", details
    large = pb.PutRequest(namespace="python", key="k", value=b"x" * 32 * 1024 * 1024)
    refused(gateway.Put, large, grpc.StatusCode.RESOURCE_EXHAUSTED)


def decided_by_the_store(pb, gateway):
    name = {"namespace": "python", "key": "decided"}
    absent = pb.Condition(existence=pb.EXISTENCE_ABSENT)
    put = gateway.Put(pb.PutRequest(**name, value=b"v", condition=absent), timeout=TIMEOUT)
    details = refused(gateway.Put, pb.PutRequest(**name, condition=absent), grpc.StatusCode.ABORTED)
    info = details[error_details_pb2.ErrorInfo]
    assert (info.reason, info.metadata["standing_version"]) == ("CONFLICT", str(put.version)), info
    gateway.Delete(pb.DeleteRequest(**name, condition=pb.Condition(version=put.version)), timeout=TIMEOUT)
    refused(gateway.Touch, pb.TouchRequest(**name), grpc.StatusCode.FAILED_PRECONDITION)

    count = pb.IncrementRequest(namespace="python", key="counter", delta=-3, request_id="count")
    first = gateway.Increment(count, timeout=TIMEOUT)
    again = gateway.Increment(count, timeout=TIMEOUT)
    assert (first.value, first.deduplicated, again.value, again.deduplicated) == (-3, False, -3, True), (first, again)
    assert first.version == again.version, (first, again)
    counts = [gateway.Increment.future(pb.IncrementRequest(namespace="python", key="counter"), timeout=TIMEOUT) for _ in range(50)]
    assert sorted(count.result().value for count in counts) == list(range(-2, 48))


def several_at_once(pb, gateway):
    def item(number):
        key = f"item {number % 300:03}"
        put = pb.PutRequest(namespace="python", key=key, value=str(number).encode(), write_mode=pb.WRITE_MODE_BEHIND)
        return pb.WriteItem(put=put)

    answer = gateway.BatchWrite(pb.BatchWriteRequest(items=[item(number) for number in range(300)]), timeout=TIMEOUT)
    assert [result.WhichOneof("outcome") for result in answer.results] == ["written"] * 300, answer
    # A stream of more writes than are under way at a time, each key again.
    requests = (pb.WriteStreamRequest(item=item(number)) for number in range(300, 1_200))
    answers = list(gateway.WriteStream(requests, timeout=TIMEOUT))
    assert [answer.number for answer in answers] == list(range(1, 901))
    assert all(answer.result.WhichOneof("outcome") == "written" for answer in answers)

    keys = [f"item {number:03}" for number in range(300)]
    answer = gateway.BatchGet(pb.BatchGetRequest(namespace="python", keys=keys), timeout=TIMEOUT)
    values = [result.found.entry.value for result in answer.results]
    assert values == [str(number).encode() for number in range(900, 1_200)], values
    token, scanned = "", []
    while True:
        request = pb.ScanRequest(namespace="python", prefix="item ", page_size=70, page_token=token)
        page = gateway.Scan(request, timeout=TIMEOUT)
        scanned += [(record.key, record.entry.value) for record in page.records]
        token = page.next_page_token
        if not token:
            break
    assert scanned == list(zip(keys, values)), scanned
    last = answers[-1].result.written.version
    awaited = gateway.AwaitPersisted(pb.AwaitPersistedRequest(namespace="python", key=keys[-1], version=last), timeout=TIMEOUT)
    assert awaited.version == last, awaited


def health(channel):
    checks = health_pb2_grpc.HealthStub(channel)
    for service in ("", "tidegate.v1.Gateway", "tidegate.store"):
        answer = checks.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, (service, answer)


def main(address):
    with tempfile.TemporaryDirectory() as directory, grpc.insecure_channel(address) as channel:
        pb, stubs = generate(directory)
        gateway = stubs.GatewayStub(channel)
        for check in (round_trips, expiry, refusals, decided_by_the_store, several_at_once):
            check(pb, gateway)
        health(channel)
        # Many calls at once on one connection.
        puts = [
            gateway.Put.future(pb.PutRequest(namespace="python", key=f"k{n % 10}", value=str(n).encode()), timeout=TIMEOUT)
            for n in range(500)
        ]
        versions = [put.result().version for put in puts]
        assert len(set(versions)) == len(versions), "each write has a version of its own"
    print("grpcio: all is well")


main(sys.argv[1])
