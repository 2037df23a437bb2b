//! BuildKit's messages about output that it has clipped.

use std::collections::HashMap;

use bollard::moby::buildkit::v1::Vertex;

/// The sizes of a build's output streams, by which the engine's messages are distinguished from output of the same
/// wording.
///
/// BuildKit counts the bytes of each stream of a step, and appends a message to the write that reaches its
/// limit: a size, or bytes per second since the start. So the message ends a chunk, and what was received
/// until then has exactly that size, or a multiple of it. Once a stream is clipped, BuildKit also counts what
/// is missing here, and further messages are recognised by their wording alone. A step that tries can count
/// its own output and imitate a message; it then misreports its own log only.
#[derive(Debug, Default)]
pub(super) struct Clips {
    streams: HashMap<(String, i64), StreamSize>,
    starts: HashMap<String, (i64, i32)>,
}

#[derive(Debug, Default)]
struct StreamSize {
    received: u64,
    is_clipped: bool,
}

impl Clips {
    const BEGINNING: &str = "\n[output clipped, log limit ";
    const END: &str = " reached]\n";

    /// Takes in the state of a step; one that runs again begins to count again.
    pub(super) fn note(&mut self, vertex: &Vertex) {
        let Some(start) = vertex.started.as_ref().map(|start| (start.seconds, start.nanos)) else { return };
        let before = self.starts.insert(vertex.digest.clone(), start);
        if before.is_some_and(|before| before != start) {
            self.streams.retain(|(digest, _), _| *digest != vertex.digest);
        }
    }

    /// Takes in a chunk of output; returns the engine's message at its end, if there is one.
    ///
    /// The message includes the line end before it, which is the engine's, too.
    pub(super) fn split<'a>(
        &mut self,
        vertex: &str,
        stream: i64,
        chunk: &'a [u8],
    ) -> (&'a [u8], Option<&'a str>) {
        let size = self.streams.entry((vertex.to_owned(), stream)).or_default();
        if let Some((output, message, limit)) = message_of(chunk) {
            let received = size.received.saturating_add(output.len() as u64);
            if size.is_clipped || limit.is_reached_by(received) {
                *size = StreamSize { received, is_clipped: true };
                return (output, Some(message));
            }
        }
        size.received = size.received.saturating_add(chunk.len() as u64);
        (chunk, None)
    }
}

/// A limit that BuildKit names in a message.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Limit {
    Bytes(u64),
    BytesPerSecond(u64),
}

impl Limit {
    /// Parses a limit such as `2MiB` or `200KiB/s`.
    fn parse(text: &str) -> Option<Self> {
        const UNITS: [(&str, u64); 5] =
            [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40), ("B", 1)];
        let (size, is_rate) = text.strip_suffix("/s").map_or((text, false), |size| (size, true));
        let (number, unit) = UNITS.iter().find_map(|(name, unit)| Some((size.strip_suffix(name)?, *unit)))?;
        let number: f64 = number.parse().ok()?;
        // Binary fractions of a unit are exact; a conversion of anything else saturates.
        let bytes = (number * unit as f64).round() as u64;
        Some(if is_rate { Self::BytesPerSecond(bytes) } else { Self::Bytes(bytes) })
    }

    /// Reports whether a stream of this size has just reached the limit.
    fn is_reached_by(self, received: u64) -> bool {
        match self {
            Self::Bytes(limit) => received > 0 && received == limit,
            Self::BytesPerSecond(limit) => received > 0 && received.checked_rem(limit) == Some(0),
        }
    }
}

/// Returns what precedes a message at the end of a chunk, its line, and its limit.
fn message_of(chunk: &[u8]) -> Option<(&[u8], &str, Limit)> {
    const MAX_LIMIT: usize = 32;
    let before = chunk.strip_suffix(Clips::END.as_bytes())?;
    let window = &before[before.len().saturating_sub(Clips::BEGINNING.len() + MAX_LIMIT)..];
    let beginning = Clips::BEGINNING.as_bytes();
    let found = window.windows(beginning.len()).rposition(|bytes| bytes == beginning)?;
    let limit = Limit::parse(std::str::from_utf8(&window[found + beginning.len()..]).ok()?)?;
    let (output, message) = chunk.split_at(before.len() - window.len() + found);
    Some((output, std::str::from_utf8(message).ok()?.trim_matches('\n'), limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: &str = "[output clipped, log limit 1KiB reached]";
    const RATE: &str = "[output clipped, log limit 1.5KiB/s reached]";

    /// Returns the messages of the engine in chunks of one stream, given as bytes of output and a line behind
    /// them.
    fn messages(chunks: &[(usize, &str)]) -> Vec<String> {
        let mut clips = Clips::default();
        let mut found = Vec::new();
        for (bytes, message) in chunks {
            let chunk = format!("{}\n{message}\n", "x".repeat(*bytes));
            let (output, message) = clips.split("a", 1, chunk.as_bytes());
            assert_eq!(output.len(), if message.is_some() { *bytes } else { chunk.len() });
            found.extend(message.map(str::to_owned));
        }
        found
    }

    #[test]
    fn a_message_comes_exactly_at_its_limit() {
        assert_eq!(messages(&[(1024, SIZE)]), [SIZE]);
        assert_eq!(messages(&[(3 * 1536, RATE)]), [RATE]);
        assert_eq!(messages(&[(1023, SIZE)]), [""; 0]);
        assert_eq!(messages(&[(0, SIZE), (0, RATE)]), [""; 0]);
        assert_eq!(messages(&[(1023 - SIZE.len() - 2, SIZE), (1, SIZE)]), [SIZE]);
        assert_eq!(messages(&[(1025, SIZE), (2048, "end")]), [""; 0]);
    }

    #[test]
    fn a_clipped_stream_is_clipped_again() {
        assert_eq!(messages(&[(1536, RATE), (17, RATE), (400, SIZE), (3, "end")]), [RATE, RATE, SIZE]);
    }

    #[test]
    fn only_a_whole_message_at_the_end_of_a_chunk_counts() {
        let mut clips = Clips::default();
        let output = "x".repeat(1024);
        for rest in [format!("\n{SIZE}\nmore\n"), SIZE.to_owned(), format!("{SIZE}\n")] {
            let chunk = format!("{output}{rest}");
            clips.streams.clear();
            assert_eq!(clips.split("a", 1, chunk.as_bytes()), (chunk.as_bytes(), None));
        }
        for limit in ["", "MiB", "xMiB", "infMiB", "nanKiB", "-1KiB", "0B", "0B/s", "2 parsecs"] {
            assert_eq!(messages(&[(1024, &format!("[output clipped, log limit {limit} reached]"))]), [""; 0]);
        }
    }

    #[test]
    fn streams_and_runs_of_a_step_count_by_themselves() {
        let mut clips = Clips::default();
        let started = |second| {
            let mut vertex = Vertex { digest: "a".to_owned(), ..Vertex::default() };
            vertex.started.get_or_insert_default().seconds = second;
            vertex
        };
        let chunk = format!("{}\n{SIZE}\n", "x".repeat(1024));
        clips.note(&started(1));
        clips.split("a", 1, b"some");
        clips.note(&started(1));
        assert_eq!(clips.split("a", 1, chunk.as_bytes()).1, None);
        assert_eq!(clips.split("a", 2, chunk.as_bytes()).1, Some(SIZE));
        clips.note(&started(2));
        assert_eq!(clips.split("a", 1, chunk.as_bytes()).1, Some(SIZE));
    }
}
