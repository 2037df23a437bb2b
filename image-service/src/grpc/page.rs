//! The size limit of a page.

use prost::Message;

/// Maximum size of a page, in bytes. By default clients accept messages of up to 4 MiB.
const MAX_BYTES: usize = 3 * 1024 * 1024;

/// Returns as many of the rows as fit a response, but at least one if there are any.
pub(super) fn fitting<T: Message>(rows: impl Iterator<Item = T>) -> Vec<T> {
    fitting_by(rows, Message::encoded_len)
}

/// Returns as many of the rows as fit a response, given the `size` of each in bytes.
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
