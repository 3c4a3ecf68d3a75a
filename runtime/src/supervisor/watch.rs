//! What a runtime looks at again and again: the plugin folder, projections that do not move, content that is not kept.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use super::Inner;
use super::plan::{Known, Plan};
use super::status::{generations, waits_for};
use crate::config::limits;
use crate::log::Forgetting;
use crate::plugin::{Folder, Found};
use crate::projection::Manager;

/// Reconciles whenever the folder has changed, until the runtime stops.
pub(super) fn folder(inner: Arc<Inner>, folder: Folder, looked: oneshot::Sender<()>) {
    let (sender, mut found) = mpsc::unbounded_channel::<Vec<Found>>();
    std::thread::Builder::new()
        .name("plugin-folder".into())
        .spawn(move || folder.watch(&sender))
        .expect("a thread can be started");
    let mut stopping = inner.stopping.subscribe();
    tokio::spawn(async move {
        let mut looked = Some(looked);
        let mut wanted = BTreeMap::new();
        let mut last = Vec::new();
        loop {
            let found = tokio::select! {
                found = found.recv() => found,
                // What was refused for the name of a view may have it now.
                () = inner.shared.released.notified() => Some(last),
                _ = stopping.wait_for(|stopping| *stopping) => None,
            };
            let Some(found) = found else { return };
            let plan = {
                let claims = inner.shared.claims.lock().expect("no panics while it is held").clone();
                let snapshots = inner.shared.snapshots.read().expect("no panics while it is held").clone();
                let ran = |name: &str| Some(snapshots.get(name)?.live.as_ref()?.record.module.clone());
                Plan::make(&wanted, &found, Known { owner: &|view| claims.get(view).cloned(), ran: &ran })
            };
            last = found;
            tracing::debug!(%plan, "the plugin folder has changed");
            inner.carry_out(&plan);
            wanted = plan.wanted;
            if let Some(looked) = looked.take() {
                if wanted.is_empty() {
                    let folder = &inner.shared.config.plugins;
                    tracing::info!(?folder, "there is no module to run; drop one into the folder");
                }
                // Whoever starts a runtime on data that is there can ask for its views at once.
                let managers: Vec<_> =
                    inner.managers.lock().expect("no panics while it is held").values().cloned().collect();
                futures_util::future::join_all(managers.iter().map(Manager::settled)).await;
                // The starter may have been dropped.
                let _ = looked.send(());
            }
        }
    });
}

impl Inner {
    fn carry_out(self: &Arc<Self>, plan: &Plan) {
        let poisoned = "no panics while it is held";
        let mut managers = self.managers.lock().expect(poisoned);
        for name in &plan.stop {
            tracing::info!(projection = name, "the module is gone; the projection stops, its views stay readable");
            managers.get(name).expect("it was started").want(None);
        }
        for name in &plan.start {
            let (file, module) = plan.wanted[name].clone();
            let manager =
                managers.entry(name.clone()).or_insert_with(|| Manager::start(name, None, self.shared.clone()));
            manager.want(Some((file, module)));
        }
        let mut refused = self.refused.write().expect(poisoned);
        for new in plan.refused.iter().filter(|r| !refused.contains(r)) {
            tracing::warn!(file = new.file, reason = new.reason, "refused a module; everything else goes on");
        }
        refused.clone_from(&plan.refused);
    }
}

/// Looks again and again which generations have something to do and do not move, until the runtime stops.
pub(super) async fn stalls(inner: Arc<Inner>) {
    let stall_after = inner.shared.config.stall_after;
    let mut looks = tokio::time::interval((stall_after / 4).min(limits::STALL_LOOK));
    let mut stopping = inner.stopping.subscribe();
    let mut known = BTreeSet::new();
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            _ = stopping.wait_for(|stopping| *stopping) => return,
        }
        let now = Instant::now();
        let log = inner.shared.log.trouble();
        let snapshots = inner.shared.snapshots.read().expect("no panics while it is held").clone();
        let mut stalled = BTreeMap::new();
        {
            let mut stalls = inner.stalls.lock().expect("no panics while it is held");
            for (name, snapshot) in &snapshots {
                for (generation, follows) in generations(snapshot) {
                    let checkpoint = generation.reached.checkpoint();
                    // Nobody knows the lag behind a log that cannot be read, nor that of a worker which has not begun.
                    let lags = || generation.reached.behind().is_none_or(|behind| behind.events > 0);
                    let behind = follows && (log.is_some() || lags());
                    let key = (name.as_str(), generation.record.number);
                    stalls.look(key, behind, checkpoint, now);
                    if stalls.quiet(key, checkpoint, now) >= stall_after {
                        let reason = waits_for(generation, log.as_deref(), stalls.quiet(key, checkpoint, now));
                        stalled.insert((name.clone(), generation.record.number), reason);
                    }
                }
            }
            stalls.forget_others(now);
        }
        for ((projection, generation), reason) in stalled.iter().filter(|(key, _)| !known.contains(*key)) {
            tracing::warn!(projection, generation, reason, "stalled");
        }
        for (projection, generation) in known.iter().filter(|key| !stalled.contains_key(*key)) {
            tracing::info!(projection, generation, "not stalled any more");
        }
        known = stalled.into_keys().collect();
    }
}

/// Has each source that keeps content for a time only forget what is older, again and again until the runtime stops.
pub(super) fn retention(inner: &Arc<Inner>) {
    let sources = inner.shared.config.sources.clone();
    let Some(shortest) = sources.values().filter_map(|source| source.keep).min() else { return };
    let (log, mut stopping) = (inner.shared.log.clone(), inner.stopping.subscribe());
    tokio::spawn(async move {
        let mut looks = tokio::time::interval((shortest / 10).clamp(limits::RETENTION_SOONEST, limits::RETENTION_LOOK));
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = looks.tick() => {}
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
            let rules: Vec<_> = sources.iter().map(|(glob, source)| (glob.clone(), source.keep)).collect();
            let log = log.clone();
            let done = tokio::task::spawn_blocking(move || log.retain(&rules)).await;
            match done {
                Ok(Ok(None)) => {}
                Ok(Ok(Some(Forgetting { number, source, events, .. }))) => {
                    tracing::info!(number, source, events, "forgot the content of events that is kept no longer");
                }
                Ok(Err(error)) => tracing::warn!(%error, "cannot forget what is kept no longer; trying again later"),
                // Everything stops.
                Err(_) => return,
            }
        }
    });
}
