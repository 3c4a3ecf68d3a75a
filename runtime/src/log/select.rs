//! Which events somebody wants: by patterns of sources and types, each name looked at once.

use super::names::{Kind, Names};
use crate::manifest::{Manifest, Subscription};

/// The events that one reader wants. For each name that the log has it keeps which patterns match, a bit a pattern, so
/// that an event is wanted if its source and its type have a bit in common.
pub(super) struct Select {
    subscriptions: Box<[Subscription]>,
    sources: Vec<u64>,
    types: Vec<u64>,
}

impl Select {
    /// Manifests have at most [`crate::config::limits::SOURCES`] subscriptions, which are the bits of a mask.
    pub(super) fn new(manifest: &Manifest) -> Select {
        assert!(manifest.sources.len() <= 64, "a mask has 64 bits");
        Select { subscriptions: manifest.sources.clone().into(), sources: Vec::new(), types: Vec::new() }
    }

    fn mask(&mut self, kind: Kind, number: u32, names: &Names) -> u64 {
        let (masks, matches): (_, fn(&Subscription, &str) -> bool) = match kind {
            Kind::Source => (&mut self.sources, Subscription::takes_source),
            Kind::Type => (&mut self.types, Subscription::wants),
        };
        if masks.len() <= number as usize {
            for name in names.from(kind, masks.len()) {
                let bit = |(i, s): (usize, &Subscription)| u64::from(matches(s, &name)) << i;
                masks.push(self.subscriptions.iter().enumerate().map(bit).sum());
            }
        }
        masks.get(number as usize).copied().unwrap_or(0)
    }

    /// The patterns of sources that match a source; it must be known to `names`.
    pub(super) fn source(&mut self, number: u32, names: &Names) -> u64 {
        self.mask(Kind::Source, number, names)
    }

    /// The patterns of types that match a type; it must be known to `names`.
    pub(super) fn event_type(&mut self, number: u32, names: &Names) -> u64 {
        self.mask(Kind::Type, number, names)
    }

    /// Whether events of this source and type are wanted; both must be known to `names`.
    pub(super) fn wants(&mut self, source: u32, event_type: u32, names: &Names) -> bool {
        self.source(source, names) & self.event_type(event_type, names) != 0
    }
}
