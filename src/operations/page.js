// What the live page does: asks /figures once a second while it is in view, and shows what it hears as numbers and charts.
//
// Owns the rates, made from two readings of counters that only grow, and the history, of which it keeps KEPT readings. What it does not
// hear it says: since when the gateway is away, and how old the numbers are. Everything that comes from the gateway is put in as text.
"use strict";

/** How long after an answer the gateway is asked again, and how long it has for its answer, in milliseconds. */
const EVERY = 1000;
const PATIENCE = 3000;
/** How many readings are kept: five minutes of them; and how many seconds a chart shows at least. */
const KEPT = 300;
const SHOWN_MIN = 60;
/** Seconds between two readings from which nothing is said of what was between them. */
const GAP = 5;
/** How long it is said that the gateway is back, in milliseconds. */
const BACK = 30000;

const CHARTS = {
  requests: { unit: rate, none: "no calls" },
  latency: { unit: time, none: "no calls" },
  hits: { unit: percent, none: "no reads", top: 1 },
  pending: { unit: count, none: "nothing known" },
  oldest: { unit: time, none: "nothing known" },
  drain: { unit: rate, none: "nothing known" },
};
const TIERS = { l1: "L1 (memory)", pending: "pending writes", l2: "L2 (Redis)", store: "store" };
const PARTS = { store: "Store and its breaker", cache: "Redis and its breakers", invalidation: "Invalidation channel", journal: "Journal", clock: "Clock" };

/** The last reading, and when it came; points for the charts, oldest first. */
let last = null;
const points = [];
/** Since when the gateway is away; and what is said of its return, until when. */
let away = null;
let back = null;

const find = (selector, from = document) => from.querySelector(selector);
const clock = () => performance.now();

// Numbers as text.

function count(n) { return n == null ? "–" : Math.round(n).toLocaleString("en"); }
function rate(n) { return n == null ? "–" : n > 0 && n < 10 ? n.toFixed(1) : count(n); }
function percent(n) { return n == null ? "–" : `${(n * 100).toFixed(1)} %`; }
function time(seconds) {
  if (seconds == null) return "–";
  if (seconds === 0) return "0 s";
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 1) return `${(seconds * 1e3).toPrecision(seconds < 0.1 ? 2 : 3)} ms`;
  if (seconds < 120) return `${seconds.toFixed(1)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

// What two readings say together.

/** By name, what each of a list was in the reading before. */
function byName(list, name) { return new Map(list.map((item) => [item[name], item])); }

function share(hits, misses) { return hits + misses > 0 ? hits / (hits + misses) : null; }

/** What `part` in one calls took no longer than, from what each bucket got; in seconds. Within a bucket, as if its calls were spread. */
function quantile(buckets, bounds, part) {
  const all = buckets.reduce((sum, calls) => sum + calls, 0);
  let wanted = all * part;
  if (all === 0) return null;
  for (let index = 0; index < bounds.length; index += 1) {
    if (wanted <= buckets[index]) {
      const from = index === 0 ? 0 : bounds[index - 1];
      return (from + (bounds[index] - from) * (wanted / buckets[index])) / 1e6;
    }
    wanted -= buckets[index];
  }
  return bounds[bounds.length - 1] / 1e6;
}

/** What happened between two readings of one process. */
function between(old, now) {
  const seconds = now.uptime_seconds - old.uptime_seconds;
  const per = (item, before, field) => (before ? Math.max(0, item[field] - before[field]) / seconds : null);
  const bounds = now.latency_bounds_micros;
  const oldCalls = byName(old.calls, "method");
  const all = bounds.map(() => 0).concat(0);
  const calls = now.calls.map((item) => {
    const before = oldCalls.get(item.method) ?? item;
    const buckets = item.latency.map((calls, index) => Math.max(0, calls - before.latency[index]));
    buckets.forEach((calls, index) => { all[index] += calls; });
    const [ok, failed] = [per(item, before, "ok"), per(item, before, "failed")];
    return { name: item.method, requests: ok + failed, failed, p50: quantile(buckets, bounds, 0.5), p99: quantile(buckets, bounds, 0.99), total: item.ok + item.failed };
  });
  const oldTiers = byName(old.tiers, "tier");
  const tiers = now.tiers.map((item) => {
    const before = oldTiers.get(item.tier);
    const [hits, misses] = [per(item, before, "hits"), per(item, before, "misses")];
    return { name: item.tier, hits, misses, rate: share(hits, misses), since: share(item.hits, item.misses) };
  });
  const oldNamespaces = byName(old.namespaces, "name");
  const namespaces = now.namespaces.map((item) => {
    const before = oldNamespaces.get(item.name);
    const [hits, misses, direct] = ["hits", "misses", "store_reads"].map((field) => per(item, before, field));
    const reads = before ? hits + misses + direct : null;
    return { name: item.name, reads, rate: share(hits, misses), writes: per(item, before, "writes"), failed: per(item, before, "failed"), pending: item.pending };
  });
  const sum = (list, field) => list.reduce((total, item) => total + item[field], 0);
  // A read is a hit if any tier before the store had it: the store's hits are the misses of all of them.
  const cached = tiers.filter((tier) => tier.name !== "store");
  const store = tiers.find((tier) => tier.name === "store");
  return {
    calls, tiers, namespaces,
    requests: sum(calls, "requests"), failed: sum(calls, "failed"), p99: quantile(all, bounds, 0.99),
    hits: share(sum(cached, "hits"), store ? store.hits : 0),
    accepted: per(now, old, "accepted"), drained: per(now, old, "drained"),
  };
}

// Showing.

function put(selector, text) {
  const at = find(selector);
  if (at.textContent !== text) at.textContent = text;
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text != null) made.textContent = text;
  if (className) made.className = className;
  return made;
}

/** An element of a chart: of the kind that `svg` is of. */
function drawn(svg, name, attributes, text) {
  const made = document.createElementNS(svg.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text != null) made.textContent = text;
  return made;
}

function rows(id, lines) {
  const made = lines.map(([name, ...cells]) => {
    const row = element("tr");
    const head = element("th", name);
    head.scope = "row";
    row.append(head, ...cells.map((cell) => element("td", cell)));
    return row;
  });
  find(`#${id} tbody`).replaceChildren(...made);
}

function showParts(reading) {
  const down = reading.redis_connections_down;
  const said = (part) => {
    if (part.part === "store") return part.good ? "up, breaker closed" : "down, breaker open";
    if (part.part !== "cache" || part.state === "none") return part.state === "none" ? "not configured" : part.state;
    return down > 0 ? `${part.state}, ${down} open` : `${part.state}, all closed`;
  };
  const item = (name, text, good) => {
    const made = element("li", null, good ? "" : "bad");
    made.append(element("span", name), element("b", text));
    return made;
  };
  const parts = reading.parts.map((part) => item(PARTS[part.part] ?? part.part, said(part), part.good && !(part.part === "cache" && down > 0)));
  find("#parts").replaceChildren(item("Gateway", reading.ready ? "ready" : "not ready", reading.ready), ...parts);
}

function showNow(reading, now) {
  const shown = {
    requests: rate(now?.requests), failed: rate(now?.failed), p99: time(now?.p99), hits: percent(now?.hits), drained: rate(now?.drained),
    pending: count(reading.pending.entries), oldest: time(reading.pending.oldest_age_seconds), dead: count(reading.dead_letters),
  };
  for (const [name, text] of Object.entries(shown)) put(`[data-now="${name}"]`, text);
}

function showTables(reading, now) {
  rows("calls", now.calls.filter((call) => call.total > 0).map((call) => [call.name, rate(call.requests), rate(call.failed), time(call.p50), time(call.p99), count(call.total)]));
  rows("tiers", now.tiers.map((tier) => [TIERS[tier.name] ?? tier.name, rate(tier.hits), rate(tier.misses), percent(tier.rate), percent(tier.since)]));
  rows("namespaces", now.namespaces.map((at) => [at.name, rate(at.reads), percent(at.rate), rate(at.writes), rate(at.failed), count(at.pending.entries), time(at.pending.oldest_age_seconds)]));
  put("#more", reading.namespaces_more > 0 ? `and ${count(reading.namespaces_more)} more` : "");
}

// Charts.

/** The next number from which three rules make a readable scale. */
function ceiling(most) {
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 3, 5, 10].map((step) => step * power).find((step) => step >= most * 0.999) ?? most;
}

/** Always the same line for the same name: in the order in which names first came. */
function lineOf(chart, name) {
  chart.names ??= [];
  if (!chart.names.includes(name)) chart.names.push(name);
  const index = chart.names.indexOf(name);
  return `line-${index % 6}${index % 12 >= 6 ? " thick" : ""}`;
}

function draw(name, chart) {
  const figure = find(`[data-chart="${name}"]`);
  const svg = find("svg", figure);
  const [left, right, top, bottom] = [48, 356, 8, 130];
  const end = points.length > 0 ? points[points.length - 1].at : clock();
  const first = points.length > 0 ? points[0].at : end;
  const shown = Math.min(KEPT, Math.max(SHOWN_MIN, (end - first) / 1000));
  const names = [...new Set(points.flatMap((point) => Object.keys(point.series?.[name] ?? {})))];
  const values = points.flatMap((point) => Object.values(point.series?.[name] ?? {})).filter((value) => value != null);
  const most = values.reduce((most, value) => Math.max(most, value), 0);
  const scale = chart.top ?? (most > 0 ? ceiling(most) : 1);
  const x = (at) => right - ((end - at) / 1000 / shown) * (right - left);
  const y = (value) => bottom - (value / scale) * (bottom - top);
  const parts = [];
  for (const part of [0, 0.5, 1]) {
    const at = y(part * scale);
    parts.push(drawn(svg, "line", { class: "rule", x1: left, x2: right, y1: at, y2: at }));
    parts.push(drawn(svg, "text", { x: left - 4, y: at + 3, "text-anchor": "end" }, chart.unit(part * scale)));
  }
  const ago = shown < 120 ? `${Math.round(shown)} s ago` : `${Math.round(shown / 60)} min ago`;
  parts.push(drawn(svg, "text", { x: left, y: 145 }, ago), drawn(svg, "text", { x: right, y: 145, "text-anchor": "end" }, away ? "last heard" : "now"));
  const legend = [];
  for (const line of names) {
    let path = "";
    let pen = "M";
    for (const point of points) {
      const value = point.series?.[name]?.[line];
      // A point beside a gap is drawn as a dot.
      if (value == null || x(point.at) < left) { pen = "M"; continue; }
      path += `${pen}${x(point.at).toFixed(1)} ${y(value).toFixed(1)}${pen === "M" ? "h0" : ""}`;
      pen = "L";
    }
    const drawing = lineOf(chart, line);
    parts.push(drawn(svg, "path", { class: drawing, d: path }));
    const item = element("li");
    const sample = drawn(svg, "svg", { viewBox: "0 0 32 8", "aria-hidden": "true" });
    sample.append(drawn(svg, "path", { class: drawing, d: "M2 4H30" }));
    const latest = points[points.length - 1].series?.[name]?.[line];
    item.append(sample, element("span", `${line} ${chart.unit(latest)}`));
    legend.push(item);
  }
  svg.replaceChildren(...parts);
  const caption = find("figcaption", figure).textContent;
  const said = legend.map((item) => item.textContent.trim()).join(", ");
  const label = said ? `${caption}. ${away ? "Last" : "Now"}: ${said}. Highest shown: ${chart.unit(most)}.` : `${caption}: ${chart.none}.`;
  svg.setAttribute("aria-label", label);
  find("ul", figure).replaceChildren(...(legend.length > 0 ? legend : [element("li", chart.none)]));
}

function drawAll() {
  for (const [name, chart] of Object.entries(CHARTS)) draw(name, chart);
}

// Hearing.

/** The lines of the charts at one moment. Calls that nobody makes have none. */
function seriesOf(reading, now) {
  const used = now.calls.filter((call) => call.total > 0);
  const lines = (list, field, label) => Object.fromEntries(list.map((item) => [label(item), item[field]]));
  return {
    requests: lines(used, "requests", (call) => call.name),
    latency: lines(used, "p99", (call) => call.name),
    hits: lines(now.tiers.filter((tier) => tier.name !== "store"), "rate", (tier) => TIERS[tier.name] ?? tier.name),
    pending: { pending: reading.pending.entries },
    oldest: { oldest: reading.pending.oldest_age_seconds },
    drain: { accepted: now.accepted, drained: now.drained },
  };
}

function heard(reading) {
  const at = clock();
  const old = last?.reading;
  const same = old?.started_unix_ms === reading.started_unix_ms;
  if (away) {
    const missed = time((at - away.at) / 1000);
    back = { until: at + BACK, text: same ? `The gateway answers again, after ${missed} without an answer.` : `The gateway was started anew, and answers after ${missed} without an answer.` };
  } else if (old && !same) {
    back = { until: at + BACK, text: "The gateway was started anew." };
  }
  away = null;
  // Others look as well, and it is read once for all: nothing new.
  if (same && reading.uptime_seconds <= old.uptime_seconds) { say(); return; }
  const near = same && reading.uptime_seconds - old.uptime_seconds <= GAP;
  const now = near ? between(old, reading) : null;
  points.push({ at, series: now && seriesOf(reading, now) });
  points.splice(0, points.length - KEPT);
  last = { reading, at };
  showNow(reading, now);
  showParts(reading);
  if (now) showTables(reading, now);
  drawAll();
  say();
}

function unheard(why) {
  if (!away) {
    // Whatever was in flight, it has been away since it was heard last.
    away = { at: last?.at ?? clock(), since: new Date(), why };
    points.push({ at: clock(), series: null });
    back = null;
    drawAll();
  }
  away.why = why;
  say();
}

function say() {
  document.body.dataset.contact = away ? "away" : last ? "here" : "waiting";
  const from = away?.since.toLocaleTimeString("en-GB");
  if (back && clock() > back.until) back = null;
  if (away) put("#contact", `The gateway does not answer since ${from} (${away.why}). ${last ? "What is shown is old." : "Nothing is known of it yet."}`);
  else if (last) put("#contact", back?.text ?? "The gateway answers.");
  document.title = away ? "▲ away – Tidegate" : "Tidegate";
  if (!last) return;
  const up = time(last.reading.uptime_seconds);
  put("#age", `Numbers read ${Math.max(0, Math.round((clock() - last.at) / 1000))} s ago. Version ${last.reading.gateway}, up for ${up}.`);
}

async function ask() {
  // Whoever does not look costs the gateway nothing.
  if (document.hidden) return;
  let reading;
  try {
    const answer = await fetch("figures", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    if (!answer.ok) throw new Error(`it answers with ${answer.status}`);
    reading = await answer.json();
  } catch (error) {
    unheard(error.name === "TimeoutError" ? `no answer in ${PATIENCE / 1000} s` : error instanceof TypeError ? "no connection" : error.message);
    return;
  }
  heard(reading);
}

/** Asks again and again, one question at a time: each so long after an answer that the next one is not the same again. */
async function follow() {
  for (;;) {
    await ask();
    await new Promise((resolve) => { setTimeout(resolve, EVERY); });
  }
}

find("#address").textContent = location.host;
drawAll();
setInterval(say, 1000);
follow();
