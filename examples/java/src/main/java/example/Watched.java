package example;

import static example.Session.DEADLINE_SECONDS;
import static example.Session.expect;
import static example.Session.failureOf;

import com.google.protobuf.ByteString;
import io.grpc.Context;
import io.grpc.Status;
import java.util.Iterator;
import java.util.Set;
import java.util.concurrent.TimeUnit;
import tidegate.v1.GatewayGrpc.GatewayBlockingStub;
import tidegate.v1.GatewayOuterClass.ChangeKind;
import tidegate.v1.GatewayOuterClass.DeleteRequest;
import tidegate.v1.GatewayOuterClass.PutRequest;
import tidegate.v1.GatewayOuterClass.PutResponse;
import tidegate.v1.GatewayOuterClass.WatchChange;
import tidegate.v1.GatewayOuterClass.WatchRequest;
import tidegate.v1.GatewayOuterClass.WatchResponse;

/** The part of the session that watches a prefix: what changes there, and what changed while nobody listened. */
final class Watched {
    /** A watch needs none: it lasts. That of an example gets one, so that it ends whatever happens. */
    private static final long WATCH_DEADLINE_SECONDS = 30;

    private final GatewayBlockingStub stub;
    private final String namespace;
    private final String prefix;
    private final String key;
    /** Where to go on, should the watch end. */
    private String token = "";

    Watched(GatewayBlockingStub stub, String namespace, String prefix) {
        this.stub = stub;
        this.namespace = namespace;
        this.prefix = prefix;
        this.key = prefix + "door";
    }

    void run() throws Exception {
        long version;
        // What is begun in a context ends with it.
        try (var context = Context.current().withCancellation()) {
            Iterator<WatchResponse> messages = context.call(this::begin);
            WatchResponse first = messages.next();
            expect(first.hasStarted(), "a watch begins with that", first);
            token = first.getResumeToken();
            PutResponse put = put("open");
            WatchChange change = next(messages, 0);
            expect(change.getKey().equals(key) && change.getKind() == ChangeKind.CHANGE_KIND_PUT, "a put is told", change);
            expect(change.getVersion() == put.getVersion(), "with its version", change);
            expect(change.getEntry().getValue().toStringUtf8().equals("open"), "and its value", change);
            var deleted = stub.withDeadlineAfter(DEADLINE_SECONDS, TimeUnit.SECONDS)
                    .delete(DeleteRequest.newBuilder().setNamespace(namespace).setKey(key).build());
            change = next(messages, change.getVersion());
            expect(change.getKey().equals(key) && change.getKind() == ChangeKind.CHANGE_KIND_DELETE, "a delete is told", change);
            expect(change.getVersion() == deleted.getVersion(), "with its version", change);
            version = change.getVersion();
            System.out.printf("watched: a put and a delete, of %s%n", first.getStarted().getScope());
        }

        // What happens meanwhile is told to whoever goes on with the last token.
        PutResponse put = put("shut");
        try (var context = Context.current().withCancellation()) {
            Iterator<WatchResponse> messages = context.call(this::begin);
            WatchResponse first = messages.next();
            expect(first.getStarted().getResumed(), "it goes on where the token says", first);
            WatchChange change = next(messages, version);
            expect(change.getVersion() == put.getVersion(), "the put is told", change);
            expect(change.getEntry().getValue().toStringUtf8().equals("shut"), "and its value", change);
            System.out.println("watched: a put while nobody listened, with the token of the last message");
        }

        token = "made up";
        Failure failure = failureOf(() -> begin().next());
        expect(failure.code() == Status.Code.INVALID_ARGUMENT, "nobody made this token", failure);
        expect(failure.violations().keySet().equals(Set.of("resume_token")), "the token is at fault", failure);
    }

    private Iterator<WatchResponse> begin() {
        return stub.withDeadlineAfter(WATCH_DEADLINE_SECONDS, TimeUnit.SECONDS)
                .watch(WatchRequest.newBuilder()
                        .setNamespace(namespace)
                        .setPrefix(prefix)
                        .setResumeToken(token)
                        .setWithValues(true)
                        .build());
    }

    /** The next change to a higher version: a change may be told more than once. */
    private WatchChange next(Iterator<WatchResponse> messages, long version) {
        while (messages.hasNext()) {
            WatchResponse message = messages.next();
            token = message.getResumeToken();
            // It says that changes may have been missed: scan the prefix, and go on. Here nothing can have been.
            expect(!message.hasRescan(), "nothing was missed", message);
            if (message.hasChange() && message.getChange().getVersion() > version) {
                return message.getChange();
            }
        }
        throw new AssertionError("the watch has ended");
    }

    private PutResponse put(String value) {
        return stub.withDeadlineAfter(DEADLINE_SECONDS, TimeUnit.SECONDS)
                .put(PutRequest.newBuilder()
                        .setNamespace(namespace)
                        .setKey(key)
                        .setValue(ByteString.copyFromUtf8(value))
                        .build());
    }
}
