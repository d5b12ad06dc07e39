//! What the serving threads count: calls by method and code, their latency, and which tier answered reads.
//!
//! Each serving thread has counters of its own, summed when they are read, so that counting on the hot path is an add to a
//! cache line that no other core writes. Owns those counters and their encoding. Latency is that of the handler, from the request's
//! headers to the answer's: what the network and the client add is not in it.

use std::{
    array,
    collections::BTreeMap,
    fmt::Error,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, NoLabelSet},
    metrics::MetricType,
    registry::Unit,
};
use tonic::Code;

use crate::{
    model::Source,
    telemetry::namespaces::{Counted, NamespaceCounters},
};

/// The methods that are counted apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// `tidegate.v1.Gateway/Get`
    Get,
    /// `tidegate.v1.Gateway/Put`
    Put,
    /// `tidegate.v1.Gateway/Delete`
    Delete,
    /// `tidegate.v1.Gateway/BatchGet`
    BatchGet,
    /// `tidegate.v1.Gateway/BatchWrite`
    BatchWrite,
    /// `tidegate.v1.Gateway/WriteStream`: one call for each stream.
    WriteStream,
    /// `tidegate.v1.Gateway/Scan`
    Scan,
    /// `tidegate.v1.Gateway/Touch`
    Touch,
    /// `tidegate.v1.Gateway/Increment`
    Increment,
    /// `tidegate.v1.Gateway/AwaitPersisted`
    AwaitPersisted,
    /// `tidegate.v1.Gateway/Watch`: one call for each stream.
    Watch,
    /// Health checks, reflection, and paths that do not exist.
    Other,
}

impl Method {
    const ALL: [(Method, &str); 12] = [
        (Method::Get, "Get"),
        (Method::Put, "Put"),
        (Method::Delete, "Delete"),
        (Method::BatchGet, "BatchGet"),
        (Method::BatchWrite, "BatchWrite"),
        (Method::WriteStream, "WriteStream"),
        (Method::Scan, "Scan"),
        (Method::Touch, "Touch"),
        (Method::Increment, "Increment"),
        (Method::AwaitPersisted, "AwaitPersisted"),
        (Method::Watch, "Watch"),
        (Method::Other, "other"),
    ];

    /// Whether a shutdown waits for its end. A watch has none, and nothing of it is lost.
    fn runs(self) -> bool {
        // Those before it.
        (self as usize) < Method::Watch as usize
    }
}

const SOURCES: [(Source, &str); 4] = [
    (Source::L1, "l1"),
    (Source::Pending, "pending"),
    (Source::L2, "l2"),
    (Source::Store, "store"),
];

const CODES: [(Code, &str); 17] = [
    (Code::Ok, "OK"),
    (Code::Cancelled, "CANCELLED"),
    (Code::Unknown, "UNKNOWN"),
    (Code::InvalidArgument, "INVALID_ARGUMENT"),
    (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
    (Code::NotFound, "NOT_FOUND"),
    (Code::AlreadyExists, "ALREADY_EXISTS"),
    (Code::PermissionDenied, "PERMISSION_DENIED"),
    (Code::ResourceExhausted, "RESOURCE_EXHAUSTED"),
    (Code::FailedPrecondition, "FAILED_PRECONDITION"),
    (Code::Aborted, "ABORTED"),
    (Code::OutOfRange, "OUT_OF_RANGE"),
    (Code::Unimplemented, "UNIMPLEMENTED"),
    (Code::Internal, "INTERNAL"),
    (Code::Unavailable, "UNAVAILABLE"),
    (Code::DataLoss, "DATA_LOSS"),
    (Code::Unauthenticated, "UNAUTHENTICATED"),
];

/// Latency buckets: the upper bounds double from 32 µs to 8.4 s, and one beyond.
pub const BUCKETS: usize = 20;
const FIRST_BUCKET_MICROS: u64 = 32;

#[derive(Debug)]
struct MethodCounters {
    by_code: [AtomicU64; CODES.len()],
    latency: [AtomicU64; BUCKETS],
    latency_micros: AtomicU64,
}

impl Default for MethodCounters {
    fn default() -> Self {
        MethodCounters {
            by_code: array::from_fn(|_| AtomicU64::new(0)),
            latency: array::from_fn(|_| AtomicU64::new(0)),
            latency_micros: AtomicU64::new(0),
        }
    }
}

/// The counters of one serving thread. Aligned so that two threads never share a cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ThreadCounters {
    methods: [MethodCounters; Method::ALL.len()],
    answered: [AtomicU64; SOURCES.len()],
    running: AtomicU64,
    /// What it counts of each namespace.
    pub namespaces: NamespaceCounters,
}

impl ThreadCounters {
    /// Counts a call that begins.
    pub fn begin(&self, method: Method) {
        if method.runs() {
            self.running.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a call that ends, whether its client is there to hear the answer or not.
    pub fn end(&self, method: Method) {
        if method.runs() {
            self.running.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// How many calls of the gateway's own methods are under way on this thread, but for watches.
    pub fn running(&self) -> u64 {
        self.running.load(Ordering::Relaxed)
    }

    /// Counts an answered call.
    pub fn call(&self, method: Method, code: Code, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let counters = &self.methods[method as usize];
        counters.by_code[code as usize].fetch_add(1, Ordering::Relaxed);
        counters.latency[bucket(micros)].fetch_add(1, Ordering::Relaxed);
        counters.latency_micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// Counts a read by the tier that answered it.
    pub fn answered(&self, source: Source) {
        self.answered[source as usize].fetch_add(1, Ordering::Relaxed);
    }
}

fn bucket(micros: u64) -> usize {
    let doublings = (micros / FIRST_BUCKET_MICROS).checked_ilog2().map_or(0, |log| log + 1);
    (doublings as usize).min(BUCKETS - 1)
}

/// What all threads together have counted of one method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MethodCalls {
    /// The method, as the metrics name it.
    pub method: &'static str,
    /// Calls answered with OK.
    pub ok: u64,
    /// Calls answered with any other code.
    pub failed: u64,
    /// Calls of each bucket of [`bounds_micros`], and those beyond.
    pub latency: [u64; BUCKETS],
}

/// The counters of all serving threads.
#[derive(Debug, Clone, Default)]
pub struct CallMetrics {
    threads: Arc<Mutex<Vec<Arc<ThreadCounters>>>>,
}

impl CallMetrics {
    /// Counters for one more thread.
    pub fn thread(&self) -> Arc<ThreadCounters> {
        let counters = Arc::new(ThreadCounters::default());
        self.threads.lock().push(Arc::clone(&counters));
        counters
    }

    /// What all threads together have counted of each namespace.
    pub fn namespaces(&self) -> BTreeMap<String, Counted> {
        let mut sum = BTreeMap::<String, Counted>::new();
        let threads = self.threads.lock().clone();
        for thread in threads {
            thread.namespaces.add_to(&mut sum);
        }
        sum
    }

    /// What was counted of each method.
    pub fn by_method(&self) -> Vec<MethodCalls> {
        let by_code =
            |method: Method, code: Code| self.sum(|thread| &thread.methods[method as usize].by_code[code as usize]);
        let failures = || CODES.iter().filter(|(code, _)| *code != Code::Ok);
        Method::ALL
            .map(|(method, name)| MethodCalls {
                method: name,
                ok: by_code(method, Code::Ok),
                failed: failures().map(|(code, _)| by_code(method, *code)).sum(),
                latency: self.latency(method),
            })
            .into()
    }

    /// Calls of the gateway's own methods that are under way.
    pub fn running(&self) -> u64 {
        self.sum(|thread| &thread.running)
    }

    fn latency(&self, method: Method) -> [u64; BUCKETS] {
        array::from_fn(|index| self.sum(|thread| &thread.methods[method as usize].latency[index]))
    }

    fn sum(&self, of: impl Fn(&ThreadCounters) -> &AtomicU64) -> u64 {
        self.threads
            .lock()
            .iter()
            .map(|thread| of(thread).load(Ordering::Relaxed))
            .sum()
    }

    fn encode_latency(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut family = encoder.encode_descriptor(
            "call_duration",
            "Time from a request's headers to its answer's, by method",
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        for (method, name) in Method::ALL {
            let micros = self.sum(|thread| &thread.methods[method as usize].latency_micros);
            let counts = self.latency(method).into_iter().enumerate();
            let buckets: Vec<(f64, u64)> = counts.map(|(index, count)| (upper_bound(index), count)).collect();
            let count = buckets.iter().map(|(_, count)| count).sum();
            family
                .encode_family(&[("method", name)])?
                .encode_histogram::<NoLabelSet>(micros as f64 / 1e6, count, &buckets, None)?;
        }
        Ok(())
    }
}

/// Where each latency bucket but the last, which has no end, ends: in microseconds.
pub fn bounds_micros() -> [u64; BUCKETS - 1] {
    array::from_fn(|index| FIRST_BUCKET_MICROS << index)
}

fn upper_bound(index: usize) -> f64 {
    if index == BUCKETS - 1 {
        return f64::INFINITY;
    }
    (FIRST_BUCKET_MICROS << index) as f64 / 1e6
}

impl Collector for CallMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut calls = encoder.encode_descriptor(
            "calls",
            "Calls answered, by method and gRPC code",
            None,
            MetricType::Counter,
        )?;
        for (method, method_name) in Method::ALL {
            for (code, code_name) in CODES {
                let count = self.sum(|thread| &thread.methods[method as usize].by_code[code as usize]);
                if count > 0 || code == Code::Ok {
                    calls
                        .encode_family(&[("method", method_name), ("code", code_name)])?
                        .encode_counter::<NoLabelSet, _, u64>(&count, None)?;
                }
            }
        }
        let mut reads = encoder.encode_descriptor(
            "reads",
            "Reads answered, by the tier that answered: l1, pending and l2 are hits, store is a miss of all of them",
            None,
            MetricType::Counter,
        )?;
        for (source, name) in SOURCES {
            let count = self.sum(|thread| &thread.answered[source as usize]);
            reads
                .encode_family(&[("source", name)])?
                .encode_counter::<NoLabelSet, _, u64>(&count, None)?;
        }
        encoder
            .encode_descriptor(
                "calls_running",
                "Calls under way, but for watches",
                None,
                MetricType::Gauge,
            )?
            .encode_gauge(&self.running())?;
        self.encode_latency(&mut encoder)
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::{encoding::text::encode, registry::Registry};

    use super::*;

    #[test]
    fn a_bucket_holds_what_is_below_its_bound() {
        for micros in [0, 31, 32, 63, 64, 1_000, 8_000_000, u64::MAX] {
            let index = bucket(micros);
            assert!((micros as f64) / 1e6 < upper_bound(index) || index == BUCKETS - 1);
            assert!(index == 0 || (micros as f64) / 1e6 >= upper_bound(index - 1));
        }
    }

    #[test]
    fn codes_stand_at_their_own_number() {
        for (index, (code, _)) in CODES.iter().enumerate() {
            assert_eq!(*code as usize, index);
        }
    }

    #[test]
    fn threads_are_summed() {
        let metrics = CallMetrics::default();
        let (a, b) = (metrics.thread(), metrics.thread());
        a.call(Method::Get, Code::Ok, Duration::from_micros(40));
        b.call(Method::Get, Code::Ok, Duration::from_millis(2));
        b.answered(Source::L2);
        let mut registry = Registry::default();
        registry.register_collector(Box::new(metrics));
        let mut text = String::new();
        encode(&mut text, &registry).expect("a string takes it");
        assert!(text.contains(r#"calls_total{method="Get",code="OK"} 2"#), "{text}");
        assert!(text.contains(r#"reads_total{source="l2"} 1"#), "{text}");
        assert!(
            text.contains(r#"call_duration_seconds_count{method="Get"} 2"#),
            "{text}"
        );
        let last = r#"call_duration_seconds_bucket{le="+Inf",method="Get"} 2"#;
        assert!(text.contains(last), "{text}");
    }

    #[test]
    fn what_is_told_of_a_method_adds_up() {
        let metrics = CallMetrics::default();
        let (a, b) = (metrics.thread(), metrics.thread());
        a.begin(Method::Put);
        a.call(Method::Put, Code::Ok, Duration::from_micros(31));
        b.call(Method::Put, Code::Unavailable, Duration::from_micros(64));
        b.call(Method::Put, Code::Internal, Duration::MAX);
        let methods = metrics.by_method();
        let put = methods
            .iter()
            .find(|calls| calls.method == "Put")
            .expect("it is counted");
        assert_eq!((put.ok, put.failed), (1, 2));
        assert_eq!(put.latency.iter().sum::<u64>(), 3);
        assert_eq!((put.latency[0], put.latency[2], put.latency[BUCKETS - 1]), (1, 1, 1));
        assert_eq!(bounds_micros()[..2], [32, 64]);
        assert_eq!(metrics.running(), 1);
    }
}
