//! The condition for an image to be listed, and the budget for the work of checking it.

use std::sync::Arc;

use memchr::memmem::Finder;

use super::{
    candidates::Candidates,
    entry::{Entry, Viewer, VisibleImage},
    images::Images,
    text::Text,
};
use crate::image::Query;

/// Remaining work of a chunk, in steps of the order or units that take as long.
#[derive(Copy, Clone, Debug)]
pub(super) struct Budget(u64);

impl Budget {
    /// Budget of one chunk: at most 512 images looked into, or 1 MiB of text.
    pub(super) const CHUNK: Self = Self(4_096);
    /// Cost of looking into an image, in steps.
    pub(super) const IMAGE: u64 = 8;
    /// Amount of text searched per step, in bytes.
    const TEXT: u64 = 256;

    #[cfg(test)]
    pub(super) fn new(steps: u64) -> Self {
        Self(steps)
    }

    pub(super) fn spend(&mut self, steps: u64) {
        self.0 = self.0.saturating_sub(steps);
    }

    pub(super) fn is_spent(self) -> bool {
        self.0 == 0
    }
}

/// The condition for an image to be listed: the caller can see it, and the query matches.
#[derive(Debug)]
pub(super) struct Filter {
    viewer: Viewer,
    pub(super) query: Query,
    finder: Option<Finder<'static>>,
    /// Amount of text searched so far, in bytes.
    searched: u64,
}

impl Filter {
    pub(super) fn new(viewer: Viewer, query: Query) -> Self {
        let finder = query.search.as_ref().map(|term| Finder::new(term.as_str()).into_owned());
        Self { viewer, query, finder, searched: 0 }
    }

    pub(super) fn candidates(&self, images: &Images) -> Candidates {
        Candidates::new(images, &self.viewer, &self.query)
    }

    /// Returns the amount of text searched so far, in bytes.
    pub(super) fn searched(&self) -> u64 {
        self.searched
    }

    pub(super) fn has_term(&self) -> bool {
        self.finder.is_some()
    }

    /// Returns the image in a slot if the caller can see it and it matches.
    ///
    /// The text is searched first, because most images do not contain the term.
    pub(super) fn look_into(
        &mut self,
        images: &Images,
        slot: u32,
        budget: &mut Budget,
    ) -> Option<VisibleImage> {
        budget.spend(Budget::IMAGE);
        if self.has_term() && !self.holds(images.text(slot)?, budget) {
            return None;
        }
        self.show(images.in_slot(slot)?)
    }

    /// Returns an image if the caller can see it and it matches.
    pub(super) fn look(&mut self, entry: &Arc<Entry>, budget: &mut Budget) -> Option<VisibleImage> {
        budget.spend(Budget::IMAGE);
        let found = self.show(entry)?;
        self.holds(&entry.text, budget).then_some(found)
    }

    /// Reports whether a text contains the term; `true` if there is no term.
    fn holds(&mut self, text: &Text, budget: &mut Budget) -> bool {
        let Some(finder) = &self.finder else {
            return true;
        };
        let text = text.bytes();
        self.searched += text.len() as u64;
        budget.spend(text.len() as u64 / Budget::TEXT);
        finder.find(&text).is_some()
    }

    /// Returns an image if the caller can see it and the filters admit it.
    fn show(&self, entry: &Arc<Entry>) -> Option<VisibleImage> {
        let standing = self.viewer.standing(entry)?;
        let is_shown = self.query.admits(&entry.image);
        is_shown.then(|| VisibleImage { entry: Arc::clone(entry), standing })
    }
}
