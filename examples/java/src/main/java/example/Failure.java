package example;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.Map;
import java.util.Optional;
import java.util.TreeMap;

/**
 * What a failed call says beyond its code: the details of its status. What never reached the gateway, or whose answer was lost, has
 * none.
 */
record Failure(
        Status.Code code,
        String reason,
        Map<String, String> metadata,
        Map<String, String> violations,
        Optional<Duration> retryDelay) {

    static Failure of(StatusRuntimeException error) throws InvalidProtocolBufferException {
        String reason = "";
        Map<String, String> metadata = Map.of();
        Map<String, String> violations = new TreeMap<>();
        Optional<Duration> retryDelay = Optional.empty();
        for (Any detail : StatusProto.fromThrowable(error).getDetailsList()) {
            if (detail.is(ErrorInfo.class)) {
                ErrorInfo info = detail.unpack(ErrorInfo.class);
                reason = info.getReason();
                metadata = info.getMetadataMap();
            } else if (detail.is(BadRequest.class)) {
                for (var violation : detail.unpack(BadRequest.class).getFieldViolationsList()) {
                    violations.put(violation.getField(), violation.getDescription());
                }
            } else if (detail.is(RetryInfo.class)) {
                var delay = detail.unpack(RetryInfo.class).getRetryDelay();
                retryDelay = Optional.of(Duration.ofSeconds(delay.getSeconds(), delay.getNanos()));
            }
        }
        return new Failure(error.getStatus().getCode(), reason, metadata, violations, retryDelay);
    }
}
