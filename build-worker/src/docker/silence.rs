//! A defect of BuildKit in Docker Engine 20.10: once more than 1 MiB of output waits to be told, it tells that, and then
//! repeats an empty message without end. The build goes on, untold.

use std::time::Duration;

use crate::engine::Told;

/// Notices that the engine has nothing to tell any more.
#[derive(Debug, Default)]
pub(super) struct Silence {
    /// How many messages in a row were empty.
    empty: u32,
}

impl Silence {
    /// An engine that works sends hardly two in a row.
    const TOO_MANY: u32 = 200;
    const PAUSE: Duration = Duration::from_millis(5);

    /// What is to be passed on of a message, if anything.
    pub(super) fn hear(&mut self, told: Told) -> Option<Told> {
        let is_empty = matches!(&told, Told::Progress(progress) if progress.is_empty());
        if !is_empty {
            self.empty = 0;
            return Some(told);
        }
        self.empty = self.empty.saturating_add(1);
        (self.empty == Self::TOO_MANY).then_some(Told::Silent)
    }

    /// Lets an empty message pass, and the processor rest when there are too many of them.
    pub(super) async fn pass(&self) {
        if self.empty > Self::TOO_MANY && self.empty.is_multiple_of(64) {
            tokio::time::sleep(Self::PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_long_row_of_empty_messages_is_silence() {
        let mut silence = Silence::default();
        let empty = || Told::Progress(Vec::new());
        for _ in 0..3 {
            for _ in 1..Silence::TOO_MANY {
                assert!(silence.hear(empty()).is_none());
            }
            assert!(matches!(silence.hear(Told::ImageId(String::new())), Some(Told::ImageId(_))));
        }
        let told: Vec<Told> = (0..1_000).filter_map(|_| silence.hear(empty())).collect();
        assert!(matches!(told[..], [Told::Silent]));
    }
}
