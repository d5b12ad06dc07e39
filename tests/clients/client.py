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


def health(channel):
    checks = health_pb2_grpc.HealthStub(channel)
    for service in ("", "tidegate.v1.Gateway", "tidegate.store"):
        answer = checks.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, (service, answer)


def main(address):
    with tempfile.TemporaryDirectory() as directory, grpc.insecure_channel(address) as channel:
        pb, stubs = generate(directory)
        gateway = stubs.GatewayStub(channel)
        for check in (round_trips, expiry, refusals):
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
