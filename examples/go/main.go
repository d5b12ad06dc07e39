// A client of Tidegate in Go, with stubs that ./build generates from the contract.
//
//	session ADDRESS [LOSSY-ADDRESS]
//
// Puts, gets, batches, counts, watches, and reads what failures say. A lossy address leads to the same gateway over a network that loses the first
// answer: there the retry of the service config is seen. Ends with 0 when every answer was the expected one.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"maps"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "session/tidegatev1"
)

// Every call has a deadline: without one the gateway's default holds, which knows nothing of your caller's patience.
const deadline = 10 * time.Second

// A watch needs none: it lasts. That of an example gets one, so that it ends whatever happens.
const watchDeadline = 30 * time.Second

const namespace = "examples"

// call makes a call that has until the deadline.
func call[Q, A any](ctx context.Context, method func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) (A, error) {
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	return method(ctx, request)
}

// failure is what a failed call says beyond its code: the details of its status. What never reached the gateway, or whose answer was
// lost, has none.
type failure struct {
	code       codes.Code
	reason     string
	metadata   map[string]string
	violations map[string]string
	retryDelay time.Duration
}

func failureOf(err error) failure {
	said := status.Convert(err)
	failed := failure{code: said.Code(), violations: map[string]string{}}
	for _, detail := range said.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			failed.reason, failed.metadata = detail.Reason, detail.Metadata
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				failed.violations[violation.Field] = violation.Description
			}
		case *errdetails.RetryInfo:
			failed.retryDelay = detail.RetryDelay.AsDuration()
		}
	}
	return failed
}

// session is one client at work, on keys of its own.
type session struct {
	gateway pb.GatewayClient
	prefix  string
}

func (s session) key(name string) string { return s.prefix + "/" + name }

func (s session) putAndGet(ctx context.Context) error {
	key := s.key("user")
	put, err := call(ctx, s.gateway.Put, &pb.PutRequest{
		Namespace: namespace,
		Key:       key,
		Value:     []byte("Anna"),
		Ttl:       durationpb.New(time.Hour),
		Tags:      []string{"users"},
		RequestId: uuid.NewString(),
	})
	if err != nil {
		return err
	}
	// Any gateway answers with this write or a newer one when it is given the version.
	got, err := call(ctx, s.gateway.Get, &pb.GetRequest{Namespace: namespace, Key: key, MinVersion: put.Version})
	if err != nil {
		return err
	}
	if string(got.Entry.GetValue()) != "Anna" || got.Entry.Version != put.Version || got.Entry.ExpireTime == nil {
		return fmt.Errorf("put version %d, and got %v", put.Version, got)
	}
	fmt.Printf("put and got: version %d, resting on %v, read from %v\n", put.Version, put.Durability, got.Source)

	if _, err := call(ctx, s.gateway.Delete, &pb.DeleteRequest{Namespace: namespace, Key: key}); err != nil {
		return err
	}
	got, err = call(ctx, s.gateway.Get, &pb.GetRequest{Namespace: namespace, Key: key})
	if err != nil {
		return err
	}
	if got.Entry != nil {
		return fmt.Errorf("deleted, and still there: %v", got)
	}
	fmt.Println("deleted: the key is absent")
	return nil
}

func (s session) batch(ctx context.Context) error {
	item := func(key string) *pb.WriteItem {
		put := &pb.PutRequest{Namespace: namespace, Key: key, Value: []byte(key), RequestId: uuid.NewString()}
		return &pb.WriteItem{Operation: &pb.WriteItem_Put{Put: put}}
	}
	keys := []string{s.key("item/0"), s.key("item/1"), s.key("item/2")}
	// The last item is not valid: it fails alone.
	items := []*pb.WriteItem{item(keys[0]), item(keys[1]), item(keys[2]), item("")}
	written, err := call(ctx, s.gateway.BatchWrite, &pb.BatchWriteRequest{Items: items})
	if err != nil {
		return err
	}
	for place := range keys {
		if written.Results[place].GetWritten() == nil {
			return fmt.Errorf("item %d was not written: %v", place, written)
		}
	}
	refused := written.Results[len(keys)].GetFailure()
	if refused.GetReason() != "INVALID" || len(refused.Violations) != 1 || refused.Violations[0].Field != "key" {
		return fmt.Errorf("the item without a key was answered with %v", written.Results[len(keys)])
	}

	read, err := call(ctx, s.gateway.BatchGet, &pb.BatchGetRequest{Namespace: namespace, Keys: append(keys, s.key("nothing"))})
	if err != nil {
		return err
	}
	for place, key := range keys {
		if value := read.Results[place].GetFound().GetEntry().GetValue(); string(value) != key {
			return fmt.Errorf("item %d is %q", place, value)
		}
	}
	if absent := read.Results[len(keys)].GetFound(); absent == nil || absent.Entry != nil {
		return fmt.Errorf("what was never written is %v", read.Results[len(keys)])
	}
	fmt.Printf("batch: 3 items written and read back; the fourth was refused, its %s %s\n",
		refused.Violations[0].Field, refused.Violations[0].Description)
	return nil
}

func (s session) invalid(ctx context.Context) error {
	_, err := call(ctx, s.gateway.Put, &pb.PutRequest{Namespace: "No Such Name", Key: "k", Ttl: durationpb.New(-time.Second)})
	failed := failureOf(err)
	fields := slices.Sorted(maps.Keys(failed.violations))
	if failed.code != codes.InvalidArgument || failed.reason != "INVALID" || !slices.Equal(fields, []string{"namespace", "ttl"}) {
		return fmt.Errorf("a put of an invalid namespace and ttl was answered with %+v", failed)
	}
	if failed.metadata["outcome"] != "not_applied" || failed.retryDelay != 0 {
		return fmt.Errorf("what will never be valid is worth no other try: %+v", failed)
	}
	for _, field := range fields {
		fmt.Printf("refused: %s %s\n", field, failed.violations[field])
	}
	return nil
}

func (s session) conflict(ctx context.Context) error {
	free := &pb.Condition{Existence: pb.Existence_EXISTENCE_ABSENT}
	seat := &pb.PutRequest{Namespace: namespace, Key: s.key("seat"), Value: []byte("Anna"), Condition: free}
	taken, err := call(ctx, s.gateway.Put, seat)
	if err != nil {
		return err
	}
	seat.Value = []byte("Bob")
	_, err = call(ctx, s.gateway.Put, seat)
	failed := failureOf(err)
	if failed.code != codes.Aborted || failed.reason != "CONFLICT" {
		return fmt.Errorf("the second of two who want a seat was answered with %+v", failed)
	}
	if failed.metadata["standing_version"] != strconv.FormatInt(taken.Version, 10) {
		return fmt.Errorf("version %d stands, and this was said: %+v", taken.Version, failed)
	}
	fmt.Printf("conflict: version %d stands\n", taken.Version)
	return nil
}

func (s session) comeBack(ctx context.Context) error {
	put := func() (*pb.PutResponse, error) {
		return call(ctx, s.gateway.Put, &pb.PutRequest{Namespace: namespace, Key: s.key("awaited"), RequestId: uuid.NewString()})
	}
	first, err := put()
	if err != nil {
		return err
	}
	// Awaits a write that is still to come. The gateway waits for as long as its default deadline allows, and says when to come back.
	awaited := &pb.AwaitPersistedRequest{Namespace: namespace, Key: s.key("awaited"), Version: first.Version + 1}
	_, err = s.gateway.AwaitPersisted(ctx, awaited)
	failed := failureOf(err)
	if failed.code != codes.Unavailable || failed.reason != "NOT_PERSISTED" || failed.retryDelay <= 0 {
		return fmt.Errorf("what nobody wrote was awaited, and answered with %+v", failed)
	}
	if _, err := put(); err != nil {
		return err
	}
	time.Sleep(failed.retryDelay)
	answer, err := call(ctx, s.gateway.AwaitPersisted, awaited)
	if err != nil {
		return err
	}
	if answer.Version < awaited.Version {
		return fmt.Errorf("awaited version %d, and got %d", awaited.Version, answer.Version)
	}
	fmt.Printf("came back after %v, as told: the store has version %d\n", failed.retryDelay, answer.Version)
	return nil
}

// watching is a watch that goes on.
type watching struct {
	messages pb.Gateway_WatchClient
	started  *pb.WatchStarted
	// Where to go on, should it end.
	token string
	end   context.CancelFunc
}

func (s session) beginWatch(ctx context.Context, token string) (*watching, error) {
	ctx, cancel := context.WithTimeout(ctx, watchDeadline)
	messages, err := s.gateway.Watch(ctx, &pb.WatchRequest{
		Namespace: namespace, Prefix: s.key("watched/"), ResumeToken: token, WithValues: true,
	})
	if err != nil {
		cancel()
		return nil, err
	}
	first, err := messages.Recv()
	if err == nil && first.GetStarted() == nil {
		err = fmt.Errorf("a watch began with %v", first)
	}
	if err != nil {
		cancel()
		return nil, err
	}
	return &watching{messages: messages, started: first.GetStarted(), token: first.ResumeToken, end: cancel}, nil
}

// nextChange is the next change to a higher version: a change may be told more than once.
func (w *watching) nextChange(version int64) (*pb.WatchChange, error) {
	for {
		message, err := w.messages.Recv()
		if err != nil {
			return nil, err
		}
		w.token = message.ResumeToken
		// It says that changes may have been missed: scan the prefix, and go on. Here nothing can have been.
		if rescan := message.GetRescan(); rescan != nil {
			return nil, fmt.Errorf("a rescan: %v", rescan)
		}
		if change := message.GetChange(); change != nil && change.Version > version {
			return change, nil
		}
	}
}

func (s session) watch(ctx context.Context) error {
	key := s.key("watched/door")
	w, err := s.beginWatch(ctx, "")
	if err != nil {
		return err
	}
	defer w.end()
	put, err := call(ctx, s.gateway.Put, &pb.PutRequest{Namespace: namespace, Key: key, Value: []byte("open")})
	if err != nil {
		return err
	}
	change, err := w.nextChange(0)
	if err != nil {
		return err
	}
	if change.Key != key || change.Kind != pb.ChangeKind_CHANGE_KIND_PUT || change.Version != put.Version || string(change.Entry.GetValue()) != "open" {
		return fmt.Errorf("put version %d, and was told %v", put.Version, change)
	}
	deleted, err := call(ctx, s.gateway.Delete, &pb.DeleteRequest{Namespace: namespace, Key: key})
	if err != nil {
		return err
	}
	change, err = w.nextChange(change.Version)
	if err != nil {
		return err
	}
	if change.Key != key || change.Kind != pb.ChangeKind_CHANGE_KIND_DELETE || change.Version != deleted.Version {
		return fmt.Errorf("deleted with version %d, and was told %v", deleted.Version, change)
	}
	w.end()
	fmt.Printf("watched: a put and a delete, of %v\n", w.started.Scope)

	// What happens meanwhile is told to whoever goes on with the last token.
	put, err = call(ctx, s.gateway.Put, &pb.PutRequest{Namespace: namespace, Key: key, Value: []byte("shut")})
	if err != nil {
		return err
	}
	again, err := s.beginWatch(ctx, w.token)
	if err != nil {
		return err
	}
	defer again.end()
	if !again.started.Resumed {
		return fmt.Errorf("the watch did not go on: %v", again.started)
	}
	change, err = again.nextChange(change.Version)
	if err != nil {
		return err
	}
	if change.Version != put.Version || string(change.Entry.GetValue()) != "shut" {
		return fmt.Errorf("put version %d meanwhile, and was told %v", put.Version, change)
	}
	fmt.Println("watched: a put while nobody listened, with the token of the last message")

	_, err = s.beginWatch(ctx, "made up")
	failed := failureOf(err)
	if _, named := failed.violations["resume_token"]; failed.code != codes.InvalidArgument || !named {
		return fmt.Errorf("a token that nobody made was answered with %+v", failed)
	}
	return nil
}

func (s session) countOnce(ctx context.Context, where string) (*pb.IncrementResponse, error) {
	count := &pb.IncrementRequest{Namespace: namespace, Key: s.key("visits"), RequestId: uuid.NewString()}
	first, err := call(ctx, s.gateway.Increment, count)
	if err != nil {
		return nil, err
	}
	again, err := call(ctx, s.gateway.Increment, count)
	if err != nil {
		return nil, err
	}
	if first.Value != 1 || again.Value != 1 || !again.Deduplicated || first.Version != again.Version {
		return nil, fmt.Errorf("sent twice under one request id: first %v, then %v", first, again)
	}
	fmt.Printf("%s: sent twice under one request id, counted once\n", where)
	return first, nil
}

func connect(address string) (*grpc.ClientConn, error) {
	config, err := os.ReadFile("../service-config.json")
	if err != nil {
		return nil, err
	}
	// One channel for the whole process. The service config says what is tried again.
	return grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultServiceConfig(string(config)))
}

func run(ctx context.Context, address, lossy string) error {
	prefix := "go/" + uuid.NewString()
	channel, err := connect(address)
	if err != nil {
		return err
	}
	defer channel.Close()
	s := session{gateway: pb.NewGatewayClient(channel), prefix: prefix}
	for _, step := range []func(context.Context) error{s.putAndGet, s.batch, s.invalid, s.conflict, s.comeBack, s.watch} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	if _, err := s.countOnce(ctx, "counter"); err != nil || lossy == "" {
		return err
	}

	channel, err = connect(lossy)
	if err != nil {
		return err
	}
	defer channel.Close()
	s = session{gateway: pb.NewGatewayClient(channel), prefix: prefix + "/lossy"}
	first, err := s.countOnce(ctx, "lossy network")
	if err != nil {
		return err
	}
	// The answer that arrived is that of the second try, which the library made by itself.
	if !first.Deduplicated {
		return errors.New("the first answer arrived, and should have been lost")
	}
	fmt.Println("lossy network: the lost answer was asked for again by the service config")
	return nil
}

func main() {
	log.SetFlags(0)
	if len(os.Args) < 2 || len(os.Args) > 3 {
		log.Fatal("usage: session ADDRESS [LOSSY-ADDRESS]")
	}
	lossy := ""
	if len(os.Args) == 3 {
		lossy = os.Args[2]
	}
	if err := run(context.Background(), os.Args[1], lossy); err != nil {
		log.Fatal(err)
	}
	fmt.Println("all is well")
}
