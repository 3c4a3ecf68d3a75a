//! What should run, by the plugin folder, against what runs.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::Refused;
use crate::plugin::{Found, Module};

/// Which projection is to be run by which file.
pub(super) type Wanted = BTreeMap<String, (String, Module)>;

/// What changes from what is wanted now to what the folder holds.
pub(super) struct Plan {
    /// What is wanted from now on.
    pub(super) wanted: Wanted,
    /// Projections whose module is new, another one, or in another file.
    pub(super) start: Vec<String>,
    /// Projections whose module is gone.
    pub(super) stop: Vec<String>,
    pub(super) refused: Vec<Refused>,
}

/// What there is beside the folder.
#[derive(Clone, Copy)]
pub struct Known<'a> {
    /// Which projection a view belongs to.
    pub owner: &'a dyn Fn(&str) -> Option<String>,
    /// The hash of the module that a projection has run last.
    pub ran: &'a dyn Fn(&str) -> Option<String>,
}

impl Plan {
    /// Where two files claim the same thing, the one that runs already keeps it; else the one with the module that has run
    /// last, so that a restart changes nothing; else the higher version, else the first by name.
    pub(super) fn make(now: &Wanted, found: &[Found], known: Known<'_>) -> Plan {
        let mut refused = Vec::new();
        let mut modules: Vec<(&str, &Module)> = Vec::new();
        for Found { file, module } in found {
            match module {
                Ok(module) => modules.push((file, module)),
                Err(reason) => refused.push(Refused { file: file.clone(), reason: reason.clone() }),
            }
        }
        let runs = |file: &str, module: &Module| now.get(&module.manifest.projection).is_some_and(|(f, _)| f == file);
        let ran = |module: &Module| (known.ran)(&module.manifest.projection).is_some_and(|hash| hash == module.hash);
        modules.sort_by_cached_key(|(file, module)| {
            (!runs(file, module), !ran(module), Reverse(module.manifest.version), file.to_string())
        });
        let mut wanted = Wanted::new();
        let mut views: BTreeMap<&str, &str> = BTreeMap::new();
        for (file, module) in modules {
            match clash(module, &wanted, &views, known) {
                Some(reason) => {
                    refused.push(Refused { file: file.to_owned(), reason });
                    let name = &module.manifest.projection;
                    // A module that cannot replace the one that runs leaves it running.
                    if let Some((former, standing)) = now.get(name).filter(|(f, _)| f == file)
                        && !wanted.contains_key(name)
                    {
                        views.extend(standing.manifest.views.iter().map(|v| (v.name.as_str(), name.as_str())));
                        wanted.insert(name.clone(), (former.clone(), standing.clone()));
                    }
                }
                None => {
                    let name = &module.manifest.projection;
                    views.extend(module.manifest.views.iter().map(|v| (v.name.as_str(), name.as_str())));
                    wanted.insert(name.clone(), (file.to_owned(), module.clone()));
                }
            }
        }
        // So does a file that is broken: the module that it had goes on, unless another file has it by now.
        for (name, (file, standing)) in now {
            let broken = found.iter().any(|found| found.file == *file && found.module.is_err());
            let taken = standing.manifest.views.iter().any(|v| views.contains_key(v.name.as_str()));
            if broken && !taken && !wanted.contains_key(name) {
                wanted.insert(name.clone(), (file.clone(), standing.clone()));
            }
        }
        let same = |name: &str, file: &str, hash: &str| now.get(name).is_some_and(|(f, m)| f == file && m.hash == hash);
        let start = wanted.iter().filter(|(name, (file, module))| !same(name, file, &module.hash));
        let start = start.map(|(name, _)| name.clone());
        let stop: BTreeSet<_> = now.keys().filter(|name| !wanted.contains_key(*name)).cloned().collect();
        refused.sort_by(|a, b| a.file.cmp(&b.file));
        Plan { start: start.collect(), stop: stop.into_iter().collect(), wanted, refused }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "start [{}], stop [{}]", self.start.join(", "), self.stop.join(", "))?;
        self.refused.iter().try_for_each(|r| write!(f, ", refuse {}", r.file))
    }
}

/// What dropping `module` into the folder would come to, by the rules that the runtime goes by: the file that it would
/// be, and why it would be refused. It takes the place of the file that runs its projection, if there is one, else it is
/// `file`. `folder` is what is there now.
pub fn would_refuse(module: &Module, file: &str, folder: &[Found], known: Known<'_>) -> (String, Option<String>) {
    let now = Plan::make(&Wanted::new(), folder, known).wanted;
    let file = now.get(&module.manifest.projection).map_or(file, |(file, _)| file).to_owned();
    let mut then: Vec<Found> = folder.iter().filter(|found| found.file != file).cloned().collect();
    then.push(Found { file: file.clone(), module: Ok(module.clone()) });
    let refused = Plan::make(&now, &then, known).refused.into_iter().find(|refused| refused.file == file);
    (file, refused.map(|refused| refused.reason))
}

fn clash(module: &Module, wanted: &Wanted, views: &BTreeMap<&str, &str>, known: Known<'_>) -> Option<String> {
    let name = &module.manifest.projection;
    if let Some((file, _)) = wanted.get(name) {
        return Some(format!(
            "projection {name:?} is already run by {file:?}; remove one of the files, or rename the projection"
        ));
    }
    module.manifest.views.iter().find_map(|view| {
        let other = views.get(view.name.as_str()).map(|p| p.to_string()).or_else(|| (known.owner)(&view.name));
        other.filter(|other| other != name).map(|other| {
            format!(
                "view {:?} belongs to projection {other:?} already; rename the view, and build the module again",
                view.name
            )
        })
    })
}
