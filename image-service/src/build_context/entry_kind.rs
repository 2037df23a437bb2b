//! The kinds of entries of a tar.

use tar::EntryType;

/// Kind of an entry in the tar format.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    SymbolicLink,
    HardLink,
    Pipe,
    /// The label of the archive itself, as of `tar --label`.
    Label,
    ExtensionHeader(ExtensionHeader),
    Other,
}

/// Kind of an extended header, which describes the next entry or all entries after it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum ExtensionHeader {
    LongPath,
    LongTarget,
    Pax,
    GlobalPax,
}

impl Kind {
    pub(super) fn new(entry: EntryType) -> Self {
        const LABEL: u8 = b'V';
        if entry.is_file() || entry.is_contiguous() {
            Self::File
        } else if entry.is_dir() {
            Self::Directory
        } else if entry.is_symlink() {
            Self::SymbolicLink
        } else if entry.is_hard_link() {
            Self::HardLink
        } else if entry.is_fifo() {
            Self::Pipe
        } else if entry.as_byte() == LABEL {
            Self::Label
        } else if entry.is_gnu_longname() {
            Self::ExtensionHeader(ExtensionHeader::LongPath)
        } else if entry.is_gnu_longlink() {
            Self::ExtensionHeader(ExtensionHeader::LongTarget)
        } else if entry.is_pax_local_extensions() {
            Self::ExtensionHeader(ExtensionHeader::Pax)
        } else if entry.is_pax_global_extensions() {
            Self::ExtensionHeader(ExtensionHeader::GlobalPax)
        } else {
            Self::Other
        }
    }
}
