//! Relay of the engine's progress to the service.

use tokio::time::{Instant, sleep_until};

use super::{Job, outcome::Ended};
use crate::{
    engine::{BuiltImage, EngineEvent, RunningWork},
    output::Output,
    telemetry::StepSpans,
};

impl Job {
    /// Reports the engine's progress until the work has ended; returns the image, if one was built.
    pub(super) async fn relay_progress(
        &self,
        mut work: Box<dyn RunningWork>,
        output: &mut Output,
    ) -> Result<Option<BuiltImage>, Ended> {
        let begun = Instant::now();
        let mut built = None;
        let mut failure = None;
        let mut spans = StepSpans::new();
        loop {
            let event = tokio::select! {
                biased;
                () = self.control.stop.cancelled() => {
                    return Err(self.stop(work, output, Vec::new(), begun).await);
                }
                // This is due a few times per second at most, so it does not keep the engine waiting.
                () = sleep_until_some(output.due()) => Some(Ok(EngineEvent::Progress(Vec::new()))),
                event = work.next() => event,
            };
            let now = Instant::now().into_std();
            let is_over = event.is_none();
            let mut events = Vec::new();
            match event {
                Some(Ok(EngineEvent::Progress(progress))) => {
                    for progress in progress {
                        output.take(progress, now, &mut events);
                    }
                    if work.runs_processes() {
                        self.steps.set(&self.name(), output.steps_under_way());
                    }
                }
                Some(Ok(EngineEvent::Built(image))) => built = Some(image),
                Some(Ok(EngineEvent::Gap(why))) => output.leave_out(why, &mut events),
                Some(Err(error)) => failure = Some(error),
                None => output.finish(&mut events),
            }
            output.report_unfinished(now, &mut events);
            spans.take(&events);
            let mut events = events.into_iter();
            while let Some((at, event)) = events.next() {
                if is_over {
                    // There is nothing left to stop.
                    self.outbox.push(at, event).await;
                    continue;
                }
                let is_pushed = tokio::select! {
                    biased;
                    () = self.outbox.push(at, event.clone()) => true,
                    () = self.control.stop.cancelled() => false,
                };
                if !is_pushed {
                    let unsent = std::iter::once((at, event)).chain(events).collect();
                    return Err(self.stop(work, output, unsent, begun).await);
                }
            }
            if is_over {
                break;
            }
        }
        match failure {
            Some(error) => Err(Ended::by_engine(&error, output.failed_step())),
            None => Ok(built),
        }
    }
}

async fn sleep_until_some(time: Option<std::time::Instant>) {
    match time {
        Some(time) => sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}
