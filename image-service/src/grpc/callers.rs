//! How much one caller may ask for: calls a second, and streams at a time.

use std::{
    collections::HashMap,
    num::NonZeroU32,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock},
    state::keyed::DashMapStateStore,
};
use opentelemetry::metrics::UpDownCounter;

use crate::{access::Principal, error::Error};

/// What every caller has asked for lately.
#[derive(Debug)]
pub(crate) struct Callers {
    /// None where calls are not counted.
    rate: Option<RateLimiter<String, DashMapStateStore<String>, DefaultClock>>,
    admitted: AtomicUsize,
    streams: Arc<Streams>,
}

#[derive(Debug)]
struct Streams {
    /// None where they are not limited.
    limit: Option<u32>,
    by_caller: Mutex<HashMap<String, u32>>,
    open: UpDownCounter<i64>,
}

/// A stream of a caller, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    streams: Arc<Streams>,
    caller: String,
}

impl Callers {
    /// After how many calls those are forgotten who have not called lately.
    const SWEEP: usize = 4_096;

    /// `rate` is in calls a second, of which those of one second may come at once, `streams` at a time; 0 is any number.
    pub(crate) fn new(rate: u32, streams: u32) -> Self {
        let open = opentelemetry::global::meter(crate::PROGRAM)
            .i64_up_down_counter("trailer.watchers")
            .with_unit("{stream}")
            .with_description("Watches of images and builds, and uploads, that are open here")
            .build();
        Self {
            rate: NonZeroU32::new(rate).map(|rate| RateLimiter::dashmap(Quota::per_second(rate))),
            admitted: AtomicUsize::new(0),
            streams: Arc::new(Streams {
                limit: Some(streams).filter(|&limit| limit > 0),
                by_caller: Mutex::default(),
                open,
            }),
        }
    }

    /// Counts a call.
    pub(super) fn admit(&self, caller: &Principal) -> Result<(), Error> {
        let Some(rate) = &self.rate else {
            return Ok(());
        };
        if self.admitted.fetch_add(1, Ordering::Relaxed) % Self::SWEEP == Self::SWEEP - 1 {
            rate.retain_recent();
        }
        let now = DefaultClock::default().now();
        rate.check_key(&caller.subject().to_owned())
            .map_err(|until| Error::TooManyCalls { retry_after: until.wait_time_from(now) })
    }

    /// Counts a stream until its place is dropped.
    pub(super) fn open_stream(&self, caller: &Principal) -> Result<Place, Error> {
        let streams = &self.streams;
        {
            let mut by_caller = streams.by_caller();
            let open = by_caller.entry(caller.subject().to_owned()).or_default();
            if let Some(limit) = streams.limit.filter(|limit| *open >= *limit) {
                return Err(Error::TooManyStreams { limit });
            }
            *open += 1;
        }
        streams.open.add(1, &[]);
        Ok(Place { streams: Arc::clone(streams), caller: caller.subject().to_owned() })
    }
}

impl Streams {
    fn by_caller(&self) -> MutexGuard<'_, HashMap<String, u32>> {
        self.by_caller.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_caller = self.streams.by_caller();
        if let Some(open) = by_caller.get_mut(&self.caller) {
            *open -= 1;
            if *open == 0 {
                by_caller.remove(&self.caller);
            }
        }
        self.streams.open.add(-1, &[]);
    }
}
