package example;

import com.google.gson.Gson;
import com.google.protobuf.ByteString;
import com.google.protobuf.Duration;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.UUID;
import java.util.concurrent.TimeUnit;
import java.util.function.Supplier;
import java.util.stream.Stream;
import tidegate.v1.GatewayGrpc;
import tidegate.v1.GatewayGrpc.GatewayBlockingStub;
import tidegate.v1.GatewayOuterClass.AwaitPersistedRequest;
import tidegate.v1.GatewayOuterClass.BatchGetRequest;
import tidegate.v1.GatewayOuterClass.BatchWriteRequest;
import tidegate.v1.GatewayOuterClass.Condition;
import tidegate.v1.GatewayOuterClass.DeleteRequest;
import tidegate.v1.GatewayOuterClass.Existence;
import tidegate.v1.GatewayOuterClass.GetRequest;
import tidegate.v1.GatewayOuterClass.IncrementRequest;
import tidegate.v1.GatewayOuterClass.IncrementResponse;
import tidegate.v1.GatewayOuterClass.PutRequest;
import tidegate.v1.GatewayOuterClass.PutResponse;
import tidegate.v1.GatewayOuterClass.WriteItem;

/**
 * A client of Tidegate in Java, with stubs that Maven generates from the contract: {@code Session ADDRESS [LOSSY-ADDRESS]}.
 *
 * <p>Puts, gets, batches, counts, watches, and reads what failures say. A lossy address leads to the same gateway over a network that
 * loses the first answer: there the retry of the service config is seen. Ends with 0 when every answer was the expected one.
 */
public final class Session {
    /** Every call has a deadline: without one the gateway's default holds, which knows nothing of your caller's patience. */
    static final long DEADLINE_SECONDS = 10;

    private static final String NAMESPACE = "examples";

    private final GatewayBlockingStub stub;
    private final String prefix;

    private Session(ManagedChannel channel, String prefix) {
        this.stub = GatewayGrpc.newBlockingStub(channel);
        this.prefix = prefix;
    }

    public static void main(String[] arguments) throws Exception {
        if (arguments.length < 1 || arguments.length > 2) {
            System.err.println("usage: Session ADDRESS [LOSSY-ADDRESS]");
            System.exit(64);
        }
        String prefix = "java/" + UUID.randomUUID();
        ManagedChannel channel = connect(arguments[0]);
        try {
            Session session = new Session(channel, prefix);
            session.putAndGet();
            session.batch();
            session.invalid();
            session.conflict();
            session.comeBack();
            new Watched(session.stub, NAMESPACE, prefix + "/watched/").run();
            session.countOnce("counter");
        } finally {
            channel.shutdownNow();
        }
        if (arguments.length == 2) {
            ManagedChannel lossy = connect(arguments[1]);
            try {
                IncrementResponse first = new Session(lossy, prefix + "/lossy").countOnce("lossy network");
                // The answer that arrived is that of the second try, which the library made by itself.
                expect(first.getDeduplicated(), "the first answer was lost", first);
                System.out.println("lossy network: the lost answer was asked for again by the service config");
            } finally {
                lossy.shutdownNow();
            }
        }
        System.out.println("all is well");
    }

    private static ManagedChannel connect(String address) throws Exception {
        @SuppressWarnings("unchecked")
        Map<String, ?> serviceConfig = new Gson().fromJson(Files.readString(Path.of("../service-config.json")), Map.class);
        // One channel for the whole process. The service config says what is tried again.
        return Grpc.newChannelBuilder(address, InsecureChannelCredentials.create())
                .defaultServiceConfig(serviceConfig)
                .build();
    }

    /** The gateway, for one call: a deadline counts from when it is set. */
    private GatewayBlockingStub gateway() {
        return stub.withDeadlineAfter(DEADLINE_SECONDS, TimeUnit.SECONDS);
    }

    private void putAndGet() {
        String key = prefix + "/user";
        PutResponse put = gateway().put(PutRequest.newBuilder()
                .setNamespace(NAMESPACE)
                .setKey(key)
                .setValue(ByteString.copyFromUtf8("Anna"))
                .setTtl(Duration.newBuilder().setSeconds(3_600))
                .addTags("users")
                .setRequestId(UUID.randomUUID().toString())
                .build());
        // Any gateway answers with this write or a newer one when it is given the version.
        var got = gateway().get(GetRequest.newBuilder()
                .setNamespace(NAMESPACE)
                .setKey(key)
                .setMinVersion(put.getVersion())
                .build());
        expect(got.hasEntry() && got.getEntry().getValue().toStringUtf8().equals("Anna"), "the value is there", got);
        expect(got.getEntry().getVersion() == put.getVersion() && got.getEntry().hasExpireTime(), "as it was put", got);
        System.out.printf(
                "put and got: version %d, resting on %s, read from %s%n", put.getVersion(), put.getDurability(), got.getSource());

        gateway().delete(DeleteRequest.newBuilder().setNamespace(NAMESPACE).setKey(key).build());
        got = gateway().get(GetRequest.newBuilder().setNamespace(NAMESPACE).setKey(key).build());
        expect(!got.hasEntry(), "the key is absent", got);
        System.out.println("deleted: the key is absent");
    }

    private void batch() {
        List<String> keys = Stream.of(0, 1, 2).map(number -> prefix + "/item/" + number).toList();
        // The last item is not valid: it fails alone.
        var items = Stream.concat(keys.stream(), Stream.of("")).map(Session::item).toList();
        var written = gateway().batchWrite(BatchWriteRequest.newBuilder().addAllItems(items).build());
        for (int place = 0; place < keys.size(); place++) {
            expect(written.getResults(place).hasWritten(), "item " + place + " is written", written);
        }
        var refused = written.getResults(keys.size()).getFailure();
        expect(refused.getReason().equals("INVALID") && refused.getViolationsCount() == 1, "the last is refused", written);
        var violation = refused.getViolations(0);
        expect(violation.getField().equals("key"), "for its key", violation);

        var read = gateway().batchGet(BatchGetRequest.newBuilder()
                .setNamespace(NAMESPACE)
                .addAllKeys(keys)
                .addKeys(prefix + "/nothing")
                .build());
        for (int place = 0; place < keys.size(); place++) {
            String value = read.getResults(place).getFound().getEntry().getValue().toStringUtf8();
            expect(value.equals(keys.get(place)), "item " + place + " is read back", read);
        }
        var nothing = read.getResults(keys.size());
        expect(nothing.hasFound() && !nothing.getFound().hasEntry(), "what was never written is absent", read);
        System.out.printf(
                "batch: 3 items written and read back; the fourth was refused, its %s %s%n",
                violation.getField(), violation.getDescription());
    }

    private static WriteItem item(String key) {
        var put = PutRequest.newBuilder()
                .setNamespace(NAMESPACE)
                .setKey(key)
                .setValue(ByteString.copyFromUtf8(key))
                .setRequestId(UUID.randomUUID().toString());
        return WriteItem.newBuilder().setPut(put).build();
    }

    private void invalid() throws Exception {
        var request = PutRequest.newBuilder()
                .setNamespace("No Such Name")
                .setKey("k")
                .setTtl(Duration.newBuilder().setSeconds(-1))
                .build();
        Failure failure = failureOf(() -> gateway().put(request));
        expect(failure.code() == Status.Code.INVALID_ARGUMENT && failure.reason().equals("INVALID"), "it is refused", failure);
        expect(failure.violations().keySet().equals(Set.of("namespace", "ttl")), "two fields are at fault", failure);
        expect("not_applied".equals(failure.metadata().get("outcome")), "nothing was changed", failure);
        expect(failure.retryDelay().isEmpty(), "what will never be valid is worth no other try", failure);
        failure.violations().forEach((field, description) -> System.out.printf("refused: %s %s%n", field, description));
    }

    private void conflict() throws Exception {
        var seat = PutRequest.newBuilder()
                .setNamespace(NAMESPACE)
                .setKey(prefix + "/seat")
                .setCondition(Condition.newBuilder().setExistence(Existence.EXISTENCE_ABSENT));
        var taken = gateway().put(seat.setValue(ByteString.copyFromUtf8("Anna")).build());
        Failure failure = failureOf(() -> gateway().put(seat.setValue(ByteString.copyFromUtf8("Bob")).build()));
        expect(failure.code() == Status.Code.ABORTED && failure.reason().equals("CONFLICT"), "the seat is taken", failure);
        String standing = failure.metadata().get("standing_version");
        expect(Long.toString(taken.getVersion()).equals(standing), "by the first", failure);
        System.out.printf("conflict: version %s stands%n", standing);
    }

    private void comeBack() throws Exception {
        String key = prefix + "/awaited";
        Supplier<PutResponse> put = () -> gateway().put(PutRequest.newBuilder()
                .setNamespace(NAMESPACE)
                .setKey(key)
                .setRequestId(UUID.randomUUID().toString())
                .build());
        // Awaits a write that is still to come. The gateway waits for as long as its default deadline allows, and says when to come back.
        var awaited = AwaitPersistedRequest.newBuilder()
                .setNamespace(NAMESPACE)
                .setKey(key)
                .setVersion(put.get().getVersion() + 1)
                .build();
        Failure failure = failureOf(() -> stub.awaitPersisted(awaited));
        expect(failure.code() == Status.Code.UNAVAILABLE && failure.reason().equals("NOT_PERSISTED"), "it is not there", failure);
        expect(failure.retryDelay().isPresent(), "it says when to come back", failure);
        long delay = failure.retryDelay().get().toMillis();
        put.get();
        Thread.sleep(delay);
        var answer = gateway().awaitPersisted(awaited);
        expect(answer.getVersion() >= awaited.getVersion(), "the store has it", answer);
        System.out.printf("came back after %d ms, as told: the store has version %d%n", delay, answer.getVersion());
    }

    private IncrementResponse countOnce(String where) {
        var count = IncrementRequest.newBuilder()
                .setNamespace(NAMESPACE)
                .setKey(prefix + "/visits")
                .setRequestId(UUID.randomUUID().toString())
                .build();
        var first = gateway().increment(count);
        var again = gateway().increment(count);
        expect(first.getValue() == 1 && again.getValue() == 1 && again.getDeduplicated(), "it is counted once", again);
        expect(first.getVersion() == again.getVersion(), "both answers are of one write", again);
        System.out.printf("%s: sent twice under one request id, counted once%n", where);
        return first;
    }

    /** Makes a call that has to fail, and says how it did. */
    static Failure failureOf(Supplier<?> call) throws Exception {
        Object answer;
        try {
            answer = call.get();
        } catch (StatusRuntimeException error) {
            return Failure.of(error);
        }
        throw new AssertionError("this should have failed, and was answered with " + answer);
    }

    static void expect(boolean holds, String what, Object seen) {
        if (!holds) {
            throw new AssertionError("expected that " + what + ", but: " + seen);
        }
    }
}
