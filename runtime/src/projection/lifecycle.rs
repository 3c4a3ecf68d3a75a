//! What happens to a projection's generations, as a pure function: no clock, no I/O, no async.
//!
//! [`State::next`] takes what has happened and answers what to do. The manager does it in that order, and each action
//! is complete before the next begins. A hot swap is a restart of the live generation with other code; a rebuild and a
//! new version are one thing: begin a generation, catch up, promote it in one step, drop the old one. A rollback is the
//! same with a former generation in place of an empty one.

/// A module as far as the lifecycle cares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleId {
    /// The hash of its bytes.
    pub hash: String,
    /// The projection's version in it.
    pub version: u32,
    /// A digest of its views and subscriptions.
    pub schema: String,
}

impl ModuleId {
    /// True if this module may go on from the other's rows.
    pub fn continues(&self, other: &ModuleId) -> bool {
        self.version == other.version && self.schema == other.schema
    }
}

/// The generation that readers see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Live {
    /// There is none yet.
    None,
    /// It is readable, but nobody follows the log for it.
    Stopped(ModuleId),
    /// It follows the log.
    Running(ModuleId),
    /// It follows the log with a new module, whose first batch is not committed yet.
    Proving {
        /// The new module.
        module: ModuleId,
        /// The module to go back to.
        previous: ModuleId,
    },
    /// It stands still so that the building generation can pass it.
    Waiting(ModuleId),
    /// It stands still, for this reason.
    Faulted(ModuleId, String),
}

/// The generation that is being built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Building {
    /// There is none.
    None,
    /// It has come some way, and nobody follows for it.
    Stopped(ModuleId),
    /// It catches up.
    Running(ModuleId),
    /// It is as far as the live one and goes on, but lacks some of what that was made from: a person says whether it takes
    /// its place.
    Ready(ModuleId),
    /// It catches up with where the live one has stopped.
    Finishing(ModuleId),
    /// It stands still, for this reason. It is kept: what failed may be needed to see why.
    Faulted(ModuleId, String),
}

/// What has happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// The folder has this module for the projection now, or none any more.
    Wanted(Option<ModuleId>),
    /// A person asks for a rebuild.
    Rebuild,
    /// A person asks for the former generation back. Not while a build runs.
    Rollback {
        /// The module that built it.
        to: ModuleId,
        /// The hash of the module that the folder has.
        folder: String,
    },
    /// A person says that the cause of a fault is gone.
    Resume,
    /// The live worker has committed the first batch of its module.
    LiveProved,
    /// The live worker has ended, because going on would lose or corrupt data.
    LiveFaulted(String),
    /// The building worker is as far as the live generation.
    BuildReady,
    /// The same, but the live one was made from more.
    BuildThinner,
    /// A person says that it takes its place all the same. Only while it is ready.
    Promote,
    /// A person says that it does not. Only while it is ready.
    Discard,
    /// There may be something in the building generation's rows that is forgotten.
    BuildForgotten,
    /// The building worker has passed where the live generation has stopped.
    BuildPassed,
    /// The building worker has ended.
    BuildFaulted(String),
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Enter a first generation, live from the start: there is nothing that it could harm.
    CreateLive(ModuleId),
    /// Follow the log for the live generation with this module.
    StartLive(ModuleId),
    /// Stop following for the live generation, after the running batch.
    StopLive,
    /// Note that the live generation is built by this module from now on.
    KeepModule(ModuleId),
    /// Enter a new generation in the shadow.
    CreateBuilding(ModuleId),
    /// Catch up for the building generation.
    StartBuilding(ModuleId),
    /// Stop catching up, after the running batch.
    StopBuilding,
    /// Stop and remove the building generation.
    DropBuilding,
    /// Make the newest former generation the building one, unless it is that already.
    Revive,
    /// Stop the building generation, which is a former one, and keep it as such.
    Shelve,
    /// Note which module of the folder is not to be taken up.
    Hold(Option<String>),
    /// Tell the building worker where the live generation has stopped.
    Finish,
    /// Make the building generation live and drop what is too old. Its worker goes on.
    Promote,
    /// Say that a module is refused, and why.
    Refuse(String, String),
}

/// A projection's generations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The generation that readers see.
    pub live: Live,
    /// The generation that is being built.
    pub building: Building,
    /// The building generation is a former one on its way back.
    pub back: bool,
    /// The hash of a module that was rolled back from. As long as the folder has it, it is not taken up.
    pub held: Option<String>,
}

impl Live {
    /// The module that runs, or ran last.
    pub fn module(&self) -> Option<&ModuleId> {
        match self {
            Live::None => None,
            Live::Stopped(m) | Live::Running(m) | Live::Waiting(m) | Live::Faulted(m, _) => Some(m),
            Live::Proving { module, .. } => Some(module),
        }
    }
}

impl Building {
    /// True if somebody follows the log for it.
    pub fn is_followed(&self) -> bool {
        matches!(self, Building::Running(_) | Building::Ready(_) | Building::Finishing(_))
    }

    /// The module that builds it.
    pub fn module(&self) -> Option<&ModuleId> {
        match self {
            Building::None => None,
            Building::Stopped(m) | Building::Running(m) | Building::Ready(m) => Some(m),
            Building::Finishing(m) | Building::Faulted(m, _) => Some(m),
        }
    }
}

impl State {
    /// True if a module may have to be started again in this state.
    pub fn uses(&self, hash: &str) -> bool {
        let previous = match &self.live {
            Live::Proving { previous, .. } => Some(previous),
            _ => None,
        };
        [self.live.module(), self.building.module(), previous].into_iter().flatten().any(|m| m.hash == hash)
    }

    /// Changes to the next state and answers what has to be done, in order.
    ///
    /// # Panics
    ///
    /// On an input that cannot happen in this state: a broken invariant of ours, not of anybody's data.
    pub fn next(&mut self, input: Input) -> Vec<Action> {
        let mut actions = Vec::new();
        match input {
            Input::Wanted(Some(module)) => self.wanted(module, &mut actions),
            Input::Wanted(None) => self.unwanted(&mut actions),
            Input::Rebuild => {
                let module = self.live.module().expect("a projection has a live generation before anyone can see it");
                let module = match &self.building {
                    // A build that has failed is done again with the module that was meant.
                    Building::Faulted(m, _) if !self.back => m.clone(),
                    _ => module.clone(),
                };
                if !self.building.is_followed() {
                    self.build(module, &mut actions);
                }
            }
            Input::Rollback { to, folder } => {
                assert!(matches!(self.building, Building::None | Building::Faulted(..)), "refused while a build runs");
                if !self.back {
                    self.end_build(&mut actions);
                }
                self.hold(Some(folder), &mut actions);
                self.revive(to, &mut actions);
            }
            Input::Resume => {
                if matches!(self.live, Live::Faulted(..)) {
                    self.resume_live(&mut actions);
                }
                if let Building::Faulted(module, _) = self.building.clone() {
                    if self.back {
                        self.revive(module, &mut actions);
                        return actions;
                    }
                    actions.push(Action::StartBuilding(module.clone()));
                    self.building = Building::Running(module);
                }
            }
            Input::LiveProved => {
                if let Live::Proving { module, .. } = &self.live {
                    actions.push(Action::KeepModule(module.clone()));
                    self.live = Live::Running(module.clone());
                }
            }
            Input::LiveFaulted(reason) => match self.live.clone() {
                Live::Running(module) => {
                    self.live = Live::Faulted(module, reason);
                }
                Live::Proving { module, previous } => {
                    actions.push(Action::Refuse(module.hash, reason));
                    self.start_live(previous, &mut actions);
                }
                other => unreachable!("a worker faulted in {other:?}"),
            },
            Input::BuildThinner => {
                let Building::Running(module) = &self.building else { unreachable!("ready in {:?}", self.building) };
                self.building = Building::Ready(module.clone());
            }
            Input::Discard => {
                assert!(matches!(self.building, Building::Ready(_)), "refused while no build is ready");
                self.end_build(&mut actions);
            }
            Input::BuildForgotten => {
                if !self.building.is_followed() {
                    return actions;
                }
                let module = self.building.module().expect("it is followed").clone();
                if let Live::Waiting(module) = self.live.clone() {
                    self.start_live(module, &mut actions);
                }
                // Nobody goes back to a generation with something in it that is forgotten.
                if self.back {
                    self.end_build(&mut actions);
                } else {
                    self.build(module, &mut actions);
                }
            }
            Input::BuildReady | Input::Promote => {
                let (Building::Running(module) | Building::Ready(module)) = &self.building else {
                    unreachable!("ready in {:?}", self.building)
                };
                self.building = Building::Finishing(module.clone());
                if let Live::Running(m) | Live::Proving { previous: m, .. } = &self.live {
                    self.live = Live::Waiting(m.clone());
                    actions.push(Action::StopLive);
                }
                actions.push(Action::Finish);
            }
            Input::BuildPassed => {
                let Building::Finishing(module) = &self.building else { unreachable!("passed in {:?}", self.building) };
                let module = module.clone();
                self.live = Live::Running(module.clone());
                self.building = Building::None;
                actions.push(Action::Promote);
                if std::mem::take(&mut self.back) && self.held.as_ref() == Some(&module.hash) {
                    // Back to what the folder has: there is nothing to be kept from it any more.
                    self.hold(None, &mut actions);
                }
            }
            Input::BuildFaulted(reason) => {
                let module = self.building.module().expect("a build faulted").clone();
                self.building = Building::Faulted(module, reason);
                if let Live::Waiting(module) = self.live.clone() {
                    self.start_live(module, &mut actions);
                }
            }
        }
        actions
    }

    fn wanted(&mut self, wanted: ModuleId, actions: &mut Vec<Action>) {
        let Some(current) = self.live.module().cloned() else {
            actions.push(Action::CreateLive(wanted.clone()));
            return self.start_live(wanted, actions);
        };
        if self.held.as_ref() == Some(&wanted.hash) {
            // A person went back from it; what runs instead goes on with the module that it had.
            return self.resume(actions);
        }
        self.hold(None, actions);
        let builds_wanted = self.building.module() == Some(&wanted);
        if builds_wanted && (wanted == current || !wanted.continues(&current)) {
            // It is on its way already; after a restart it goes on, and the live one with what it had.
            return self.resume(actions);
        }
        let was_rebuilding = !matches!(self.building, Building::None) && !self.back;
        self.end_build(actions);
        if let Live::Waiting(module) = &self.live {
            self.live = Live::Stopped(module.clone());
        }
        if wanted == current {
            // The file is what it was before; a build of something else is not wanted any more.
            return self.resume_live(actions);
        }
        if !wanted.continues(&current) {
            self.resume_live(actions);
            return self.build(wanted, actions);
        }
        let previous = match &self.live {
            Live::Proving { previous, .. } => previous.clone(),
            _ => current,
        };
        if matches!(self.live, Live::Running(_) | Live::Proving { .. }) {
            actions.push(Action::StopLive);
        }
        if wanted == previous {
            // Back to what was proved before.
            self.start_live(wanted.clone(), actions);
        } else {
            actions.push(Action::StartLive(wanted.clone()));
            self.live = Live::Proving { module: wanted.clone(), previous };
        }
        if was_rebuilding {
            // Somebody asked for a rebuild; the new code is to do it.
            self.build(wanted, actions);
        }
    }

    fn unwanted(&mut self, actions: &mut Vec<Action>) {
        match self.live.clone() {
            Live::Running(module) => {
                actions.push(Action::StopLive);
                self.live = Live::Stopped(module);
            }
            // What is not proved is not kept: when the file comes back, it has to prove itself again.
            Live::Proving { previous, .. } => {
                actions.push(Action::StopLive);
                self.live = Live::Stopped(previous);
            }
            Live::Waiting(module) | Live::Faulted(module, _) => self.live = Live::Stopped(module),
            Live::None | Live::Stopped(_) => {}
        }
        match self.building.clone() {
            Building::Running(module) | Building::Ready(module) | Building::Finishing(module) => {
                actions.push(Action::StopBuilding);
                self.building = Building::Stopped(module);
            }
            Building::Faulted(module, _) => self.building = Building::Stopped(module),
            Building::None | Building::Stopped(_) => {}
        }
    }

    fn start_live(&mut self, module: ModuleId, actions: &mut Vec<Action>) {
        actions.push(Action::StartLive(module.clone()));
        self.live = Live::Running(module);
    }

    /// Live and building generation go on with the modules that they have.
    fn resume(&mut self, actions: &mut Vec<Action>) {
        self.resume_live(actions);
        match self.building.clone() {
            Building::Stopped(module) => {
                actions.push(Action::StartBuilding(module.clone()));
                self.building = Building::Running(module);
            }
            Building::Faulted(module, _) if self.back => self.revive(module, actions),
            Building::Faulted(module, _) => self.build(module, actions),
            Building::None | Building::Running(_) | Building::Ready(_) | Building::Finishing(_) => {}
        }
    }

    /// One that runs, runs on; one that waits, waits; one that stands still gets another chance, unless the building
    /// generation is about to pass it.
    fn resume_live(&mut self, actions: &mut Vec<Action>) {
        if let Live::Stopped(module) | Live::Faulted(module, _) = self.live.clone() {
            match self.building {
                Building::Finishing(_) => self.live = Live::Waiting(module),
                _ => self.start_live(module, actions),
            }
        }
    }

    fn build(&mut self, module: ModuleId, actions: &mut Vec<Action>) {
        self.end_build(actions);
        actions.push(Action::CreateBuilding(module.clone()));
        actions.push(Action::StartBuilding(module.clone()));
        self.building = Building::Running(module);
    }

    fn revive(&mut self, module: ModuleId, actions: &mut Vec<Action>) {
        actions.push(Action::Revive);
        actions.push(Action::StartBuilding(module.clone()));
        self.building = Building::Running(module);
        self.back = true;
    }

    /// There is no building generation any more. A former one is kept: one may still want to go back to it.
    fn end_build(&mut self, actions: &mut Vec<Action>) {
        if !matches!(self.building, Building::None) {
            actions.push(if self.back { Action::Shelve } else { Action::DropBuilding });
        }
        self.building = Building::None;
        if std::mem::take(&mut self.back) && self.held.as_ref() == self.live.module().map(|m| &m.hash) {
            // Nobody went back in the end.
            self.hold(None, actions);
        }
    }

    fn hold(&mut self, module: Option<String>, actions: &mut Vec<Action>) {
        if self.held != module {
            actions.push(Action::Hold(module.clone()));
            self.held = module;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn module(hash: &str, version: u32) -> ModuleId {
        ModuleId { hash: hash.into(), version, schema: "s".into() }
    }

    fn running(hash: &str, version: u32) -> State {
        State { live: Live::Running(module(hash, version)), ..nothing() }
    }

    fn nothing() -> State {
        State { live: Live::None, building: Building::None, back: false, held: None }
    }

    /// Version 2 is live and was made by `b`; version 1 is kept.
    fn rolling_back() -> State {
        let mut state = running("b", 2);
        let actions = state.next(Input::Rollback { to: module("a", 1), folder: "b".into() });
        let hold = Action::Hold(Some("b".into()));
        assert_eq!(actions, [hold, Action::Revive, Action::StartBuilding(module("a", 1))]);
        state
    }

    #[test]
    fn a_rollback_catches_up_and_is_promoted_and_the_file_is_not_taken_up_again() {
        let mut state = rolling_back();
        assert_eq!(state.next(Input::BuildReady), [Action::StopLive, Action::Finish]);
        assert_eq!(state.next(Input::BuildPassed), [Action::Promote]);
        let rolled_back = State { held: Some("b".into()), ..running("a", 1) };
        assert_eq!(state, rolled_back);
        assert_eq!(state.next(Input::Wanted(Some(module("b", 2)))), []);
        state.live = Live::Stopped(module("a", 1));
        assert_eq!(state.next(Input::Wanted(Some(module("b", 2)))), [Action::StartLive(module("a", 1))]);
        let c = module("c", 3);
        let actions = state.next(Input::Wanted(Some(c.clone())));
        assert_eq!(actions, [Action::Hold(None), Action::CreateBuilding(c.clone()), Action::StartBuilding(c)]);
    }

    #[test]
    fn a_rollback_of_a_rollback_is_as_before_both() {
        let mut state = State { held: Some("b".into()), ..running("a", 1) };
        state.next(Input::Rollback { to: module("b", 2), folder: "b".into() });
        state.next(Input::BuildReady);
        assert_eq!(state.next(Input::BuildPassed), [Action::Promote, Action::Hold(None)]);
        assert_eq!(state, running("b", 2));
    }

    #[test]
    fn a_rollback_that_is_given_up_keeps_the_former_generation() {
        let c = module("c", 3);
        let actions = rolling_back().next(Input::Wanted(Some(c.clone())));
        let build = [Action::CreateBuilding(c.clone()), Action::StartBuilding(c)];
        assert_eq!(actions[..2], [Action::Hold(None), Action::Shelve]);
        assert_eq!(actions[2..], build);
        let mut failed = rolling_back();
        failed.next(Input::BuildFaulted("why".into()));
        let mut again = failed.clone();
        assert_eq!(again.next(Input::Wanted(Some(module("b", 2))))[0], Action::Revive);
        assert_eq!(failed.next(Input::Rebuild)[..2], [Action::Shelve, Action::Hold(None)]);
        assert_eq!((failed.building, failed.back), (Building::Running(module("b", 2)), false));
    }

    #[test]
    fn what_is_faulted_is_resumed_and_nothing_else() {
        let (a, b) = (module("a", 1), module("b", 2));
        let live = Live::Faulted(a.clone(), "why".into());
        let mut state = State { live, building: Building::Faulted(b.clone(), "why".into()), back: false, held: None };
        assert_eq!(state.next(Input::Resume), [Action::StartLive(a.clone()), Action::StartBuilding(b.clone())]);
        assert_eq!((&state.live, &state.building), (&Live::Running(a), &Building::Running(b)));
        assert_eq!(state.next(Input::Resume), []);
    }

    #[test]
    fn the_same_version_and_schema_is_a_hot_swap() {
        let mut state = running("a", 1);
        let b = module("b", 1);
        assert_eq!(state.next(Input::Wanted(Some(b.clone()))), [Action::StopLive, Action::StartLive(b.clone())]);
        assert_eq!(state.next(Input::LiveProved), [Action::KeepModule(b.clone())]);
        assert_eq!(state.live, Live::Running(b));
    }

    #[test]
    fn a_module_that_fails_in_its_first_batch_is_refused_and_the_former_goes_on() {
        let mut state = running("a", 1);
        state.next(Input::Wanted(Some(module("b", 1))));
        let actions = state.next(Input::LiveFaulted("why".into()));
        assert_eq!(actions, [Action::Refuse("b".into(), "why".into()), Action::StartLive(module("a", 1))]);
        assert_eq!(state, running("a", 1));
    }

    #[test]
    fn another_version_is_built_in_the_shadow_and_promoted() {
        let mut state = running("a", 1);
        let b = module("b", 2);
        let actions = state.next(Input::Wanted(Some(b.clone())));
        assert_eq!(actions, [Action::CreateBuilding(b.clone()), Action::StartBuilding(b)]);
        assert_eq!(state.next(Input::BuildReady), [Action::StopLive, Action::Finish]);
        assert_eq!(state.next(Input::BuildPassed), [Action::Promote]);
        assert_eq!(state, running("b", 2));
    }

    #[test]
    fn a_build_that_fails_at_the_last_moment_wakes_the_live_one() {
        let mut state = running("a", 1);
        state.next(Input::Rebuild);
        state.next(Input::BuildReady);
        let actions = state.next(Input::BuildFaulted("why".into()));
        assert_eq!(actions, [Action::StartLive(module("a", 1))]);
    }

    #[test]
    fn after_a_restart_a_build_goes_on_and_the_live_one_with_the_module_it_had() {
        let (live, building) = (Live::Stopped(module("a", 1)), Building::Stopped(module("b", 2)));
        let mut state = State { live, building, ..nothing() };
        let actions = state.next(Input::Wanted(Some(module("b", 2))));
        assert_eq!(actions, [Action::StartLive(module("a", 1)), Action::StartBuilding(module("b", 2))]);
    }

    /// What the actions have made of the world. Generations are told by the modules that the catalogue has for them.
    #[derive(Default)]
    struct World {
        live: Option<ModuleId>,
        live_runs: bool,
        building: Option<ModuleId>,
        building_runs: bool,
        back: bool,
        former: Vec<ModuleId>,
        held: Option<String>,
    }

    impl World {
        /// Does an action, and insists that it can be done.
        fn perform(&mut self, action: Action) {
            let held = |m: &ModuleId, held: &Option<String>| held.as_ref() == Some(&m.hash);
            match action {
                Action::CreateLive(m) => assert!(self.live.replace(m).is_none(), "a second live generation"),
                Action::StartLive(m) => {
                    assert!(!std::mem::replace(&mut self.live_runs, true), "a second writer of the live generation");
                    let live = self.live.as_ref().expect("nothing to follow for");
                    assert!(m.continues(live), "a module goes on from rows that are not its own");
                    assert!(m == *live || !held(&m, &self.held), "what was rolled back from is taken up");
                }
                Action::StopLive => assert!(std::mem::take(&mut self.live_runs), "stopped what does not run"),
                Action::KeepModule(m) => assert!(m.continues(&self.live.replace(m.clone()).expect("it runs"))),
                Action::CreateBuilding(m) => {
                    assert!(self.live.as_ref() == Some(&m) || !held(&m, &self.held), "built what was rolled back from");
                    assert!(self.building.replace(m).is_none(), "a second build");
                }
                Action::StartBuilding(m) => {
                    assert!(!std::mem::replace(&mut self.building_runs, true), "a second writer of the build");
                    assert_eq!(self.building, Some(m));
                }
                Action::StopBuilding => assert!(std::mem::take(&mut self.building_runs)),
                Action::DropBuilding => {
                    assert!(self.building.take().is_some(), "dropped what is not there");
                    assert!(!self.back, "dropped what one may want to go back to");
                    self.building_runs = false;
                }
                Action::Revive if self.back => assert!(self.building.is_some()),
                Action::Revive => {
                    self.back = true;
                    assert!(self.building.replace(self.former.pop().expect("one is kept")).is_none(), "a second build");
                }
                Action::Shelve => {
                    assert!(std::mem::take(&mut self.back));
                    self.former.push(self.building.take().expect("there is nothing to keep"));
                    self.building_runs = false;
                }
                Action::Hold(module) => self.held = module,
                Action::Finish => assert!(self.building_runs && !self.live_runs, "the target would move"),
                Action::Promote => {
                    assert!(!self.live_runs, "a zombie would go on writing");
                    self.former.extend(self.live.take());
                    self.live = self.building.take();
                    self.live_runs = std::mem::take(&mut self.building_runs);
                    self.back = false;
                    assert!(self.live_runs);
                }
                Action::Refuse(..) => {}
            }
        }

        /// What is found after a restart.
        fn state(&mut self) -> State {
            (self.live_runs, self.building_runs) = (false, false);
            State {
                live: self.live.clone().map_or(Live::None, Live::Stopped),
                building: self.building.clone().map_or(Building::None, Building::Stopped),
                back: self.back,
                held: self.held.clone(),
            }
        }
    }

    proptest! {
        #[test]
        fn whatever_happens_there_is_one_writer_a_generation(
            inputs in proptest::collection::vec((0..13, 0..3_usize, 1..3_u32), 1..60)
        ) {
            let mut state = nothing();
            let mut world = World::default();
            let mut folder = None;
            for (kind, hash, version) in inputs {
                let why = || "why".to_owned();
                let input = match kind {
                    0 | 1 => {
                        let module = module(&format!("{}{version}", ["a", "b", "c"][hash]), version);
                        folder = Some(module.clone());
                        Input::Wanted(Some(module))
                    }
                    2 => { folder = None; Input::Wanted(None) }
                    3 if matches!(state.live, Live::None) => continue,
                    3 if state.back && world.building_runs => continue,
                    3 => Input::Rebuild,
                    10 => Input::Resume,
                    // What only a running worker can say.
                    4 if world.live_runs && hash == 0 => Input::LiveProved,
                    4 if world.live_runs => { world.live_runs = false; Input::LiveFaulted(why()) }
                    5 if world.building_runs && hash == 0 => { world.building_runs = false; Input::BuildFaulted(why()) }
                    5 | 6 if world.building_runs => match state.building {
                        Building::Running(_) if hash == 1 => Input::BuildThinner,
                        Building::Running(_) => Input::BuildReady,
                        Building::Ready(_) if hash == 1 => Input::Discard,
                        Building::Ready(_) => Input::Promote,
                        _ => Input::BuildPassed,
                    },
                    // What a worker has said may come late.
                    11 => Input::BuildForgotten,
                    7 | 8 => {
                        let to = if state.back { world.building.clone() } else { world.former.last().cloned() };
                        match (&state.building, to, &folder) {
                            (Building::None | Building::Faulted(..), Some(to), Some(folder)) => {
                                Input::Rollback { to, folder: folder.hash.clone() }
                            }
                            _ => continue,
                        }
                    }
                    9 => { state = world.state(); Input::Wanted(folder.clone()) }
                    _ => continue,
                };
                for action in state.next(input) {
                    world.perform(action);
                }
                prop_assert_eq!(matches!(state.live, Live::Running(_) | Live::Proving { .. }), world.live_runs);
                prop_assert_eq!(state.building.is_followed(), world.building_runs);
                prop_assert_eq!(state.live.module().is_some(), world.live.is_some());
                prop_assert_eq!(state.building.module(), world.building.as_ref());
                prop_assert_eq!(state.back, world.back);
                prop_assert_eq!(&state.held, &world.held);
                let waits = matches!(state.live, Live::Waiting(_));
                prop_assert!(!waits || matches!(state.building, Building::Finishing(_)), "waits for nobody");
                // A folder that has something else again ends a rollback.
                let held = state.held.as_ref();
                prop_assert!(held.is_none() || folder.as_ref().is_none_or(|f| Some(&f.hash) == held));
            }
        }
    }
}
