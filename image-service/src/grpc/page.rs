//! How much one answer holds.

use prost::Message;

/// Clients take 4 MiB in a message, unless they were told otherwise.
const MAX_BYTES: usize = 3 * 1024 * 1024;

/// Returns as many of the rows as fit an answer; at least one, if there is one.
pub(super) fn fitting<T: Message>(rows: impl Iterator<Item = T>) -> Vec<T> {
    fitting_by(rows, Message::encoded_len)
}

/// The same of rows of which `size` returns how many bytes they take.
pub(super) fn fitting_by<T>(rows: impl Iterator<Item = T>, size: impl Fn(&T) -> usize) -> Vec<T> {
    let mut bytes = 0;
    let mut page = Vec::new();
    for row in rows {
        bytes += size(&row);
        if bytes > MAX_BYTES && !page.is_empty() {
            break;
        }
        page.push(row);
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_fits_a_message_and_is_never_empty() {
        let row = |bytes| "x".repeat(bytes);
        assert_eq!(fitting((0..10).map(|_| row(MAX_BYTES / 2 - 100))).len(), 2);
        assert_eq!(fitting([row(2 * MAX_BYTES), row(1)].into_iter()).len(), 1);
        assert_eq!(fitting([row(1), row(1)].into_iter()).len(), 2);
    }
}
