// A client of Tidegate in Node, with stubs that are made from the contract when it starts.
//
// node session.js ADDRESS [LOSSY-ADDRESS]
//
// Puts, gets, batches, counts, watches, and reads what failures say. A lossy address leads to the same gateway over a network that loses the first
// answer: there the retry of the service config is seen. Ends with 0 when every answer was the expected one.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

// Every call has a deadline: without one the gateway's default holds, which knows nothing of your caller's patience.
const DEADLINE_MS = 10_000;
// A watch needs none: it lasts. That of an example gets one, so that it ends whatever happens.
const WATCH_DEADLINE_MS = 30_000;

const NAMESPACE = "examples";

const here = (path) => fileURLToPath(new URL(path, import.meta.url));
// A version has 63 bits, more than a number of JavaScript's holds: it stays a string.
const options = { longs: String, enums: String, defaults: true, oneofs: true };
const contract = protoLoader.loadSync("tidegate/v1/gateway.proto", { ...options, includeDirs: [here("../../proto")] });
const { Gateway } = grpc.loadPackageDefinition(contract).tidegate.v1;
const rpc = protoLoader.loadSync(here("details.proto"), options);
const serviceConfig = readFileSync(here("../service-config.json"), "utf8");

function connect(address) {
  // One channel for the whole process. The service config says what is tried again.
  const gateway = new Gateway(address, grpc.credentials.createInsecure(), { "grpc.service_config": serviceConfig });
  const call = (method, request, deadlineMs = DEADLINE_MS) =>
    new Promise((resolve, reject) => {
      const deadline = deadlineMs === null ? Infinity : Date.now() + deadlineMs;
      gateway[method](request, { deadline }, (error, answer) => (error ? reject(error) : resolve(answer)));
    });
  const watch = (request) => gateway.watch(request, { deadline: Date.now() + WATCH_DEADLINE_MS });
  return { call, watch, close: () => gateway.close() };
}

// What a failed call says beyond its code: the details of its status. What never reached the gateway, or whose answer was lost, has none.
function failure(error) {
  const said = { code: error.code, reason: null, metadata: {}, violations: {}, retryDelayMs: null };
  const [packed] = error.metadata.get("grpc-status-details-bin");
  const details = packed ? rpc["google.rpc.Status"].deserialize(packed).details : [];
  for (const { type_url: url, value } of details) {
    const name = url.slice(url.lastIndexOf("/") + 1);
    const detail = rpc[name]?.deserialize(value);
    if (name === "google.rpc.ErrorInfo") {
      Object.assign(said, { reason: detail.reason, metadata: detail.metadata });
    } else if (name === "google.rpc.BadRequest") {
      for (const violation of detail.fieldViolations) said.violations[violation.field] = violation.description;
    } else if (name === "google.rpc.RetryInfo") {
      said.retryDelayMs = Number(detail.retryDelay.seconds) * 1_000 + detail.retryDelay.nanos / 1e6;
    }
  }
  return said;
}

// Waits for a call that has to fail, and says how it did.
async function failureOf(calling) {
  let answer;
  try {
    answer = await calling;
  } catch (error) {
    return failure(error);
  }
  throw new Error(`this should have failed, and was answered with ${JSON.stringify(answer)}`);
}

async function putAndGet(gateway, prefix) {
  const name = { namespace: NAMESPACE, key: `${prefix}/user` };
  const put = await gateway.call("put", {
    ...name,
    value: Buffer.from("Anna"),
    ttl: { seconds: 3_600 },
    tags: ["users"],
    requestId: randomUUID(),
  });
  // Any gateway answers with this write or a newer one when it is given the version.
  let got = await gateway.call("get", { ...name, minVersion: put.version });
  assert.equal(got.entry?.value.toString(), "Anna");
  assert.equal(got.entry.version, put.version);
  assert.ok(got.entry.expireTime, "the record expires");
  console.log(`put and got: version ${put.version}, resting on ${put.durability}, read from ${got.source}`);

  await gateway.call("delete", name);
  got = await gateway.call("get", name);
  assert.equal(got.entry, null);
  console.log("deleted: the key is absent");
}

async function batch(gateway, prefix) {
  const item = (key) => ({ put: { namespace: NAMESPACE, key, value: Buffer.from(key), requestId: randomUUID() } });
  const keys = [0, 1, 2].map((number) => `${prefix}/item/${number}`);
  // The last item is not valid: it fails alone.
  const written = await gateway.call("batchWrite", { items: [...keys, ""].map(item) });
  assert.deepEqual(
    written.results.map((result) => result.outcome),
    ["written", "written", "written", "failure"],
  );
  const { reason, violations } = written.results[3].failure;
  assert.equal(reason, "INVALID");
  assert.deepEqual(violations.map((violation) => violation.field), ["key"]);

  const read = await gateway.call("batchGet", { namespace: NAMESPACE, keys: [...keys, `${prefix}/nothing`] });
  const values = read.results.map((result) => result.found.entry?.value.toString() ?? null);
  assert.deepEqual(values, [...keys, null]);
  console.log(`batch: 3 items written and read back; the fourth was refused, its ${violations[0].field} ${violations[0].description}`);
}

async function invalid(gateway) {
  const said = await failureOf(gateway.call("put", { namespace: "No Such Name", key: "k", ttl: { seconds: -1 } }));
  assert.equal(said.code, grpc.status.INVALID_ARGUMENT);
  assert.equal(said.reason, "INVALID");
  assert.deepEqual(Object.keys(said.violations).sort(), ["namespace", "ttl"]);
  assert.equal(said.metadata.outcome, "not_applied");
  assert.equal(said.retryDelayMs, null);
  for (const [field, description] of Object.entries(said.violations)) console.log(`refused: ${field} ${description}`);
}

async function conflict(gateway, prefix) {
  const seat = { namespace: NAMESPACE, key: `${prefix}/seat`, condition: { existence: "EXISTENCE_ABSENT" } };
  const taken = await gateway.call("put", { ...seat, value: Buffer.from("Anna") });
  const said = await failureOf(gateway.call("put", { ...seat, value: Buffer.from("Bob") }));
  assert.equal(said.code, grpc.status.ABORTED);
  assert.equal(said.reason, "CONFLICT");
  assert.equal(said.metadata.standing_version, taken.version);
  console.log(`conflict: version ${taken.version} stands`);
}

async function comeBack(gateway, prefix) {
  const name = { namespace: NAMESPACE, key: `${prefix}/awaited` };
  const put = () => gateway.call("put", { ...name, requestId: randomUUID() });
  // Awaits a write that is still to come. The gateway waits for as long as its default deadline allows, and says when to come back.
  const awaited = { ...name, version: String(BigInt((await put()).version) + 1n) };
  const said = await failureOf(gateway.call("awaitPersisted", awaited, null));
  assert.equal(said.code, grpc.status.UNAVAILABLE);
  assert.equal(said.reason, "NOT_PERSISTED");
  assert.ok(said.retryDelayMs > 0, "it says when to come back");
  await put();
  await sleep(said.retryDelayMs);
  const answer = await gateway.call("awaitPersisted", awaited);
  assert.ok(BigInt(answer.version) >= BigInt(awaited.version), answer.version);
  console.log(`came back after ${said.retryDelayMs} ms, as told: the store has version ${answer.version}`);
}

async function watch(gateway, prefix) {
  const watched = { namespace: NAMESPACE, prefix: `${prefix}/watched/`, withValues: true };
  const name = { namespace: NAMESPACE, key: `${watched.prefix}door` };
  let resumeToken = "";

  async function begin() {
    const stream = gateway.watch({ ...watched, resumeToken });
    const messages = stream[Symbol.asyncIterator]();
    const { value: first } = await messages.next();
    assert.equal(first.event, "started");
    resumeToken = first.resumeToken;
    return { stream, messages, started: first.started };
  }

  // The next change to a higher version: a change may be told more than once. The token is where to go on, should the watch end.
  async function nextChange({ messages }, version) {
    for (;;) {
      const { value: message, done } = await messages.next();
      assert.ok(!done, "the watch has ended");
      resumeToken = message.resumeToken;
      // A rescan says that changes may have been missed: scan the prefix, and go on. Here nothing can have been.
      assert.notEqual(message.event, "rescan");
      if (message.event === "change" && BigInt(message.change.version) > BigInt(version)) return message.change;
    }
  }

  // Who ends a watch is told that it was cancelled.
  function end({ stream }) {
    stream.on("error", () => {});
    stream.cancel();
  }

  let watching = await begin();
  let put = await gateway.call("put", { ...name, value: Buffer.from("open") });
  let change = await nextChange(watching, 0);
  assert.deepEqual([change.key, change.kind, change.version], [name.key, "CHANGE_KIND_PUT", put.version]);
  assert.equal(change.entry.value.toString(), "open");
  const deleted = await gateway.call("delete", name);
  change = await nextChange(watching, change.version);
  assert.deepEqual([change.key, change.kind, change.version], [name.key, "CHANGE_KIND_DELETE", deleted.version]);
  end(watching);
  console.log(`watched: a put and a delete, of ${watching.started.scope}`);

  // What happens meanwhile is told to whoever goes on with the last token.
  put = await gateway.call("put", { ...name, value: Buffer.from("shut") });
  watching = await begin();
  assert.ok(watching.started.resumed, "it goes on where the token says");
  change = await nextChange(watching, change.version);
  assert.deepEqual([change.kind, change.version], ["CHANGE_KIND_PUT", put.version]);
  assert.equal(change.entry.value.toString(), "shut");
  end(watching);
  console.log("watched: a put while nobody listened, with the token of the last message");

  const refused = gateway.watch({ namespace: NAMESPACE, resumeToken: "made up" });
  const said = await failureOf(refused[Symbol.asyncIterator]().next());
  assert.equal(said.code, grpc.status.INVALID_ARGUMENT);
  assert.deepEqual(Object.keys(said.violations), ["resume_token"]);
}

async function countOnce(gateway, prefix, where) {
  const count = { namespace: NAMESPACE, key: `${prefix}/visits`, requestId: randomUUID() };
  const first = await gateway.call("increment", count);
  const again = await gateway.call("increment", count);
  assert.deepEqual([first.value, again.value, again.deduplicated], ["1", "1", true]);
  assert.equal(first.version, again.version);
  console.log(`${where}: sent twice under one request id, counted once`);
  return first;
}

const [address, lossy, ...more] = process.argv.slice(2);
if (!address || more.length > 0) {
  console.error("usage: node session.js ADDRESS [LOSSY-ADDRESS]");
  process.exit(64);
}
const prefix = `node/${randomUUID()}`;
const gateway = connect(address);
await putAndGet(gateway, prefix);
await batch(gateway, prefix);
await invalid(gateway);
await conflict(gateway, prefix);
await comeBack(gateway, prefix);
await watch(gateway, prefix);
await countOnce(gateway, prefix, "counter");
gateway.close();
if (lossy) {
  const through = connect(lossy);
  const first = await countOnce(through, `${prefix}/lossy`, "lossy network");
  // The answer that arrived is that of the second try, which the library made by itself.
  assert.ok(first.deduplicated, "the first answer was lost");
  console.log("lossy network: the lost answer was asked for again by the service config");
  through.close();
}
console.log("all is well");
