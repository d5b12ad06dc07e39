"""A client of Tidegate in Python, with stubs that `./build` generates from the contract.

session.py ADDRESS [LOSSY-ADDRESS]

Puts, gets, batches, counts, watches, and reads what failures say. A lossy address leads to the same gateway over a network that loses the first
answer: there the retry of the service config is seen. Ends with 0 when every answer was the expected one.
"""

import pathlib
import sys
import time
import uuid

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tidegate.v1 import gateway_pb2 as pb
from tidegate.v1 import gateway_pb2_grpc

# Every call has a deadline: without one the gateway's default holds, which knows nothing of your caller's patience.
DEADLINE = 10
# A watch needs none: it lasts. That of an example gets one, so that it ends whatever happens.
WATCH_DEADLINE = 30

NAMESPACE = "examples"
SERVICE_CONFIG = pathlib.Path(__file__).resolve().parent.parent / "service-config.json"


class Failure:
    """What a failed call says beyond its code: the details of its status."""

    def __init__(self, error):
        self.code = error.code()
        self.reason, self.metadata = None, {}
        self.violations = {}
        self.retry_delay = None
        status = rpc_status.from_call(error)
        # What never reached the gateway, or whose answer was lost, has no details.
        for packed in status.details if status else []:
            info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
            if packed.Unpack(info):
                self.reason, self.metadata = info.reason, dict(info.metadata)
            elif packed.Unpack(bad):
                self.violations = {violation.field: violation.description for violation in bad.field_violations}
            elif packed.Unpack(retry):
                self.retry_delay = retry.retry_delay.ToTimedelta().total_seconds()


def failure_of(method, request, timeout=DEADLINE):
    """Makes a call that has to fail, and says how it did."""
    try:
        answer = method(request, timeout=timeout)
    except grpc.RpcError as error:
        return Failure(error)
    raise AssertionError(f"this should have failed: {request} was answered with {answer}")


def connect(address):
    # One channel for the whole process. The service config says what is tried again.
    return grpc.insecure_channel(address, options=[("grpc.service_config", SERVICE_CONFIG.read_text())])


def put_and_get(gateway, prefix):
    key = f"{prefix}/user"
    put = gateway.Put(
        pb.PutRequest(
            namespace=NAMESPACE,
            key=key,
            value=b"Anna",
            ttl=duration_pb2.Duration(seconds=3600),
            tags=["users"],
            request_id=str(uuid.uuid4()),
        ),
        timeout=DEADLINE,
    )
    # Any gateway answers with this write or a newer one when it is given the version.
    got = gateway.Get(pb.GetRequest(namespace=NAMESPACE, key=key, min_version=put.version), timeout=DEADLINE)
    assert got.HasField("entry") and got.entry.value == b"Anna", got
    assert got.entry.version == put.version and got.entry.HasField("expire_time"), got
    print(f"put and got: version {put.version}, resting on {pb.Durability.Name(put.durability)}, read from {pb.Source.Name(got.source)}")

    gateway.Delete(pb.DeleteRequest(namespace=NAMESPACE, key=key), timeout=DEADLINE)
    got = gateway.Get(pb.GetRequest(namespace=NAMESPACE, key=key), timeout=DEADLINE)
    assert not got.HasField("entry"), got
    print("deleted: the key is absent")


def batch(gateway, prefix):
    def item(key):
        put = pb.PutRequest(namespace=NAMESPACE, key=key, value=key.encode(), request_id=str(uuid.uuid4()))
        return pb.WriteItem(put=put)

    keys = [f"{prefix}/item/{number}" for number in range(3)]
    # The last item is not valid: it fails alone.
    written = gateway.BatchWrite(pb.BatchWriteRequest(items=[*map(item, keys), item("")]), timeout=DEADLINE)
    outcomes = [result.WhichOneof("outcome") for result in written.results]
    assert outcomes == ["written", "written", "written", "failure"], written
    failure = written.results[3].failure
    assert failure.reason == "INVALID" and [violation.field for violation in failure.violations] == ["key"], failure

    read = gateway.BatchGet(pb.BatchGetRequest(namespace=NAMESPACE, keys=[*keys, f"{prefix}/nothing"]), timeout=DEADLINE)
    values = [result.found.entry.value if result.found.HasField("entry") else None for result in read.results]
    assert values == [*(key.encode() for key in keys), None], read
    print(f"batch: 3 items written and read back; the fourth was refused, its {failure.violations[0].field} {failure.violations[0].description}")


def invalid(gateway):
    request = pb.PutRequest(namespace="No Such Name", key="k", ttl=duration_pb2.Duration(seconds=-1))
    failure = failure_of(gateway.Put, request)
    assert failure.code == grpc.StatusCode.INVALID_ARGUMENT and failure.reason == "INVALID", vars(failure)
    assert failure.violations.keys() == {"namespace", "ttl"}, failure.violations
    assert failure.metadata["outcome"] == "not_applied" and failure.retry_delay is None, vars(failure)
    for field, description in sorted(failure.violations.items()):
        print(f"refused: {field} {description}")


def conflict(gateway, prefix):
    key = f"{prefix}/seat"
    free = pb.Condition(existence=pb.EXISTENCE_ABSENT)
    taken = gateway.Put(pb.PutRequest(namespace=NAMESPACE, key=key, value=b"Anna", condition=free), timeout=DEADLINE)
    failure = failure_of(gateway.Put, pb.PutRequest(namespace=NAMESPACE, key=key, value=b"Bob", condition=free))
    assert failure.code == grpc.StatusCode.ABORTED and failure.reason == "CONFLICT", vars(failure)
    assert int(failure.metadata["standing_version"]) == taken.version, failure.metadata
    print(f"conflict: version {failure.metadata['standing_version']} stands")


def come_back(gateway, prefix):
    key = f"{prefix}/awaited"

    def put():
        return gateway.Put(pb.PutRequest(namespace=NAMESPACE, key=key, request_id=str(uuid.uuid4())), timeout=DEADLINE)

    # Awaits a write that is still to come. The gateway waits for as long as its default deadline allows, and says when to come back.
    awaited = pb.AwaitPersistedRequest(namespace=NAMESPACE, key=key, version=put().version + 1)
    failure = failure_of(gateway.AwaitPersisted, awaited, timeout=None)
    assert failure.code == grpc.StatusCode.UNAVAILABLE and failure.reason == "NOT_PERSISTED", vars(failure)
    assert failure.retry_delay and failure.retry_delay > 0, vars(failure)
    put()
    time.sleep(failure.retry_delay)
    answer = gateway.AwaitPersisted(awaited, timeout=DEADLINE)
    assert answer.version >= awaited.version, answer
    print(f"came back after {failure.retry_delay} s, as told: the store has version {answer.version}")


def watch(gateway, prefix):
    prefix = f"{prefix}/watched/"
    name = {"namespace": NAMESPACE, "key": f"{prefix}door"}
    token = ""

    def begin():
        request = pb.WatchRequest(namespace=NAMESPACE, prefix=prefix, resume_token=token, with_values=True)
        messages = gateway.Watch(request, timeout=WATCH_DEADLINE)
        first = next(messages)
        assert first.WhichOneof("event") == "started", first
        return messages, first

    def next_change(messages, version):
        """The next change to a higher version: a change may be told more than once. The token is where to go on, should the watch end."""
        nonlocal token
        for message in messages:
            token = message.resume_token
            event = message.WhichOneof("event")
            # A rescan says that changes may have been missed: scan the prefix, and go on. Here nothing can have been.
            assert event != "rescan", message
            if event == "change" and message.change.version > version:
                return message.change
        raise AssertionError("the watch has ended")

    messages, first = begin()
    token = first.resume_token
    put = gateway.Put(pb.PutRequest(**name, value=b"open"), timeout=DEADLINE)
    change = next_change(messages, 0)
    assert (change.key, change.kind, change.version) == (name["key"], pb.CHANGE_KIND_PUT, put.version), change
    assert change.entry.value == b"open", change
    deleted = gateway.Delete(pb.DeleteRequest(**name), timeout=DEADLINE)
    change = next_change(messages, change.version)
    assert (change.key, change.kind, change.version) == (name["key"], pb.CHANGE_KIND_DELETE, deleted.version), change
    messages.cancel()
    print(f"watched: a put and a delete, of {pb.WatchScope.Name(first.started.scope)}")

    # What happens meanwhile is told to whoever goes on with the last token.
    put = gateway.Put(pb.PutRequest(**name, value=b"shut"), timeout=DEADLINE)
    messages, first = begin()
    assert first.started.resumed, first
    change = next_change(messages, change.version)
    assert (change.kind, change.version, change.entry.value) == (pb.CHANGE_KIND_PUT, put.version, b"shut"), change
    messages.cancel()
    print("watched: a put while nobody listened, with the token of the last message")

    try:
        next(gateway.Watch(pb.WatchRequest(namespace=NAMESPACE, resume_token="made up"), timeout=DEADLINE))
    except grpc.RpcError as error:
        failure = Failure(error)
    else:
        raise AssertionError("a token that nobody made should have been refused")
    assert failure.code == grpc.StatusCode.INVALID_ARGUMENT and failure.violations.keys() == {"resume_token"}, vars(failure)


def count_once(gateway, prefix, where):
    count = pb.IncrementRequest(namespace=NAMESPACE, key=f"{prefix}/visits", request_id=str(uuid.uuid4()))
    first = gateway.Increment(count, timeout=DEADLINE)
    again = gateway.Increment(count, timeout=DEADLINE)
    assert (first.value, again.value, again.deduplicated) == (1, 1, True), (first, again)
    assert first.version == again.version, (first, again)
    print(f"{where}: sent twice under one request id, counted once")
    return first


def main(address, lossy=None):
    prefix = f"python/{uuid.uuid4()}"
    with connect(address) as channel:
        gateway = gateway_pb2_grpc.GatewayStub(channel)
        put_and_get(gateway, prefix)
        batch(gateway, prefix)
        invalid(gateway)
        conflict(gateway, prefix)
        come_back(gateway, prefix)
        watch(gateway, prefix)
        count_once(gateway, prefix, "counter")
    if lossy:
        with connect(lossy) as channel:
            first = count_once(gateway_pb2_grpc.GatewayStub(channel), f"{prefix}/lossy", "lossy network")
        # The answer that arrived is that of the second try, which the library made by itself.
        assert first.deduplicated, first
        print("lossy network: the lost answer was asked for again by the service config")
    print("all is well")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: session.py ADDRESS [LOSSY-ADDRESS]")
    main(*sys.argv[1:])
