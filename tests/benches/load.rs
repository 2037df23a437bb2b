//! Callers that call again as soon as they are answered.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::task::JoinSet;

use crate::report::Samples;

/// The outcome of a load.
#[derive(Debug)]
pub(crate) struct Load {
    /// Calls per second of all callers together.
    pub(crate) rate: f64,
    /// Latencies of the calls, in milliseconds.
    pub(crate) times: Samples,
}

/// Lets every caller make one call after another for `lasting`.
///
/// The number of a call is unique among all callers.
pub(crate) async fn load<C, F>(
    callers: Vec<C>,
    lasting: Duration,
    call: impl Fn(C, u64) -> F + Send + Sync + 'static,
) -> anyhow::Result<Load>
where
    C: Clone + Send + Sync + 'static,
    F: Future<Output = anyhow::Result<()>> + Send,
{
    let call = Arc::new(call);
    let count = callers.len() as u64;
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for (first, caller) in (0_u64..).zip(callers) {
        let call = Arc::clone(&call);
        tasks.spawn(async move {
            let mut times = Vec::new();
            let mut number = first;
            while begun.elapsed() < lasting {
                let called = Instant::now();
                call(caller.clone(), number).await?;
                times.push(milliseconds(called.elapsed()));
                number += count;
            }
            anyhow::Ok(times)
        });
    }
    let mut times = Vec::new();
    while let Some(done) = tasks.join_next().await {
        times.extend(done??);
    }
    Ok(Load { rate: times.len() as f64 / begun.elapsed().as_secs_f64(), times: Samples::new(times) })
}

pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1_000.0
}
