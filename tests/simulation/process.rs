//! A simulated process, whose tasks can be suspended and killed together.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::{task::AbortHandle, time::Instant};

/// The tasks of one process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Process(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    is_suspended: bool,
    is_killed: bool,
    resumed_at: Option<Instant>,
    waiting: Vec<Waker>,
    tasks: Vec<AbortHandle>,
}

struct Task {
    process: Process,
    work: BoxFuture<'static, ()>,
}

impl Process {
    pub(crate) fn spawn(&self, work: BoxFuture<'static, ()>) {
        let mut state = self.state();
        if !state.is_killed {
            state.tasks.retain(|task| !task.is_finished());
            let task = tokio::spawn(Task { process: self.clone(), work });
            state.tasks.push(task.abort_handle());
        }
    }

    /// Suspends all tasks until the process is resumed.
    pub(crate) fn suspend(&self) {
        self.state().is_suspended = true;
    }

    pub(crate) fn resume(&self) {
        let mut state = self.state();
        state.is_suspended = false;
        state.resumed_at = Some(Instant::now());
        state.waiting.drain(..).for_each(Waker::wake);
    }

    /// Ends all tasks for good.
    pub(crate) fn kill(&self) {
        let mut state = self.state();
        state.is_killed = true;
        state.tasks.drain(..).for_each(|task| task.abort());
    }

    /// Returns whether the process runs and was last resumed at least `duration` ago.
    pub(crate) fn has_run_for(&self, duration: Duration) -> bool {
        let state = self.state();
        let since_resumed = state.resumed_at.is_none_or(|resumed_at| resumed_at.elapsed() >= duration);
        !state.is_killed && !state.is_suspended && since_resumed
    }

    pub(crate) fn is_killed(&self) -> bool {
        self.state().is_killed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Future for Task {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        {
            let mut state = self.process.state();
            if state.is_killed {
                return Poll::Ready(());
            }
            if state.is_suspended {
                state.waiting.push(context.waker().clone());
                return Poll::Pending;
            }
        }
        self.work.as_mut().poll(context)
    }
}
