//! Alarms of the simulated code: everything that it logs as an error.

use std::{cell::RefCell, fmt};

use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
};
use tracing_subscriber::{Layer, layer::Context, prelude::*};

/// The only expected error: the simulated engines are late at times.
const EXPECTED: &str = "a build did not stop in time";

thread_local! {
    static ALARMS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

struct Alarms;

/// Captures the errors that any thread logs from now on.
pub(crate) fn listen() {
    // Another test of this process may have installed its subscriber already.
    let _ = tracing_subscriber::registry().with(Alarms.with_filter(LevelFilter::ERROR)).try_init();
}

/// Returns the errors that this thread has logged since the last call.
pub(crate) fn take() -> Vec<String> {
    ALARMS.take()
}

impl<S: Subscriber> Layer<S> for Alarms {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut message = Message(String::new());
        event.record(&mut message);
        if message.0 != EXPECTED {
            ALARMS.with_borrow_mut(|alarms| alarms.push(message.0));
        }
    }
}

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}
