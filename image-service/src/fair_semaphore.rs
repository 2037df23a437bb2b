//! A semaphore whose permits go to callers in turn, so that one caller with many waiting calls delays another
//! by one of them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::{
    access::Principal,
    error::Error,
    turns::{Turn, Turns},
};

/// A handle to the semaphore.
#[derive(Clone, Debug)]
pub(crate) struct FairSemaphore(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// Number of permits that nobody has; zero while a ticket waits.
    free: usize,
    waiting: Turns<oneshot::Sender<Permit>>,
}

/// A permit, held until dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    /// `None` once the permit was passed on.
    semaphore: Option<FairSemaphore>,
}

impl FairSemaphore {
    /// Maximum number of waiting calls of one caller: as many as it may have calls and streams.
    const MOST_WAITING: usize = 2_000;

    /// Creates a semaphore with this number of permits.
    pub(crate) fn new(permits: usize) -> Self {
        let waiting = Turns::new(oneshot::Sender::is_closed, Self::MOST_WAITING);
        Self(Arc::new(Mutex::new(State { free: permits, waiting })))
    }

    /// Waits until it is the caller's turn.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] at once if too many calls of the caller wait.
    pub(crate) async fn acquire(&self, caller: &Principal) -> Result<Permit, Error> {
        let (ticket, turn) = oneshot::channel();
        {
            let mut state = self.state();
            if state.free > 0 {
                state.free -= 1;
                return Ok(self.permit());
            }
            state.waiting.push(Turn::Caller(caller), ticket).map_err(|_| Error::Busy)?;
        }
        // A ticket is dropped only with its call.
        turn.await.map_err(|_| Error::Draining)
    }

    fn permit(&self) -> Permit {
        Permit { semaphore: Some(self.clone()) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    /// Passes the permit on to the next call that still waits.
    fn drop(&mut self) {
        let Some(semaphore) = self.semaphore.take() else {
            return;
        };
        loop {
            let next = {
                let mut state = semaphore.state();
                let next = state.waiting.pop();
                state.free += usize::from(next.is_none());
                next
            };
            let Some(next) = next else {
                return;
            };
            match next.send(semaphore.permit()) {
                Ok(()) => return,
                // The call was cancelled meanwhile.
                Err(mut permit) => permit.semaphore = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::yield_now;

    use super::*;
    use crate::timestamp::Timestamp;

    fn caller(name: &str) -> Principal {
        Principal::new(name.to_owned(), Vec::new(), Timestamp::from_micros(0))
    }

    #[tokio::test]
    async fn a_caller_waits_for_one_call_of_each_other() -> Result<(), Error> {
        let semaphore = FairSemaphore::new(1);
        let held = semaphore.acquire(&caller("greedy")).await?;
        let served = Arc::new(Mutex::new(Vec::new()));
        let mut calls = Vec::new();
        for name in ["greedy"; 5].into_iter().chain(["modest"]) {
            let (semaphore, served) = (semaphore.clone(), Arc::clone(&served));
            calls.push(tokio::spawn(async move {
                let _permit = semaphore.acquire(&caller(name)).await?;
                served.lock().expect("nobody panics with it").push(name);
                Ok::<_, Error>(())
            }));
            yield_now().await;
        }
        drop(held);
        for call in calls {
            call.await.map_err(|_| Error::Draining)??;
        }
        let served = served.lock().expect("nobody panics with it");
        assert_eq!(*served, ["greedy", "modest", "greedy", "greedy", "greedy", "greedy"]);
        Ok(())
    }

    #[tokio::test]
    async fn the_permit_of_a_cancelled_call_goes_to_the_next() -> Result<(), Error> {
        let semaphore = FairSemaphore::new(2);
        let first = semaphore.acquire(&caller("a")).await?;
        let second = semaphore.acquire(&caller("a")).await?;
        let waiting = tokio::spawn({
            let semaphore = semaphore.clone();
            async move { semaphore.acquire(&caller("b")).await.map(drop) }
        });
        yield_now().await;
        waiting.abort();
        let _ = waiting.await;
        drop((first, second));
        drop((semaphore.acquire(&caller("c")).await?, semaphore.acquire(&caller("c")).await?));
        Ok(())
    }
}
