//! Callers that wait for a record that another session of the store holds.
//!
//! Owns who waits so at a worker, until when, and how many may. Does not own the tries ([`super::tries`]), nor what tells that a record is held
//! ([`StoreError::is_held`](super::StoreError::is_held)). Invariants: there is one group for each record, and whoever comes for that record joins it: so a
//! held record costs its worker one try for each pause, however many want it; together the groups are never more than a batch.

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    backoff::Backoff,
    error::{Error, ErrorKind},
    store::{
        gather::{Bounds, RETRY_AFTER, RETRY_AFTER_FULL},
        tries::Callers,
    },
};

/// The pause between two tries for a record, at most; half of it at least. Longer leaves more of a worker's time to the others.
const PAUSE: Duration = Duration::from_millis(300);

/// The groups of a worker.
pub(super) struct Aside<C> {
    groups: Vec<Group<C>>,
    bounds: Bounds,
}

/// Who waits for one record.
struct Group<C> {
    callers: C,
    /// When it is tried again.
    due: Instant,
    bytes: usize,
}

impl<C: Callers> Aside<C> {
    /// None wait. They may be as many as a batch of `bounds`.
    pub(super) fn new(bounds: Bounds) -> Aside<C> {
        Aside {
            groups: Vec::new(),
            bounds,
        }
    }

    /// When a group is to be tried.
    pub(super) fn due(&self) -> Option<Instant> {
        self.groups.iter().map(|group| group.due).min()
    }

    /// Lets callers wait, who all want one record.
    pub(super) fn add(&mut self, mut callers: C) {
        for at in 0..self.groups.len() {
            self.join(at, &mut callers);
        }
        if callers.parts() == 0 {
            return;
        }
        let due = Instant::now() + Backoff::new(PAUSE, PAUSE).delay();
        let bytes = self.admit(&mut callers, due);
        if callers.parts() > 0 {
            self.groups.push(Group { callers, due, bytes });
        }
    }

    /// Takes those from a batch who want what others wait for.
    pub(super) fn claim(&mut self, batch: &mut C) {
        for at in 0..self.groups.len() {
            self.join(at, batch);
        }
    }

    /// The group whose turn it is.
    pub(super) fn take_due(&mut self) -> Option<C> {
        let now = Instant::now();
        let first = self.groups.iter().enumerate().min_by_key(|(_, group)| group.due);
        let at = first.filter(|(_, group)| group.due <= now).map(|(at, _)| at)?;
        let mut callers = self.groups.swap_remove(at).callers;
        callers.fail_if(|caller, now| (caller.deadline <= now).then(held));
        Some(callers)
    }

    /// Answers all who wait.
    pub(super) fn fail_all(&mut self, error: impl Fn() -> Error) {
        for mut group in self.groups.drain(..) {
            group.callers.fail_if(|_, _| Some(error()));
        }
    }

    fn join(&mut self, at: usize, others: &mut C) {
        let Some(group) = self.groups.get_mut(at) else { return };
        let due = group.due;
        let mut alike = group.callers.alike(others);
        if alike.parts() == 0 {
            return;
        }
        let bytes = self.admit(&mut alike, due);
        if let Some(group) = self.groups.get_mut(at) {
            group.callers.join(alike);
            group.bytes = group.bytes.saturating_add(bytes);
        }
    }

    /// Refuses whom no try can serve in time, while "not applied" is still certain to reach them, and who are too many. Returns what the others
    /// weigh.
    fn admit(&self, callers: &mut C, due: Instant) -> usize {
        let mut count: usize = self.groups.iter().map(|group| group.callers.parts()).sum();
        let there: usize = self.groups.iter().map(|group| group.bytes).sum();
        let mut bytes = 0usize;
        callers.fail_if(|caller, _| {
            if !caller.open && caller.deadline <= due {
                return Some(held());
            }
            let weight = C::weight(&caller.question);
            let heavier = bytes.saturating_add(weight);
            let full = count >= self.bounds.batch_max || there.saturating_add(heavier) > self.bounds.batch_bytes_max;
            if full && count > 0 {
                return Some(too_many());
            }
            count += 1;
            bytes = heavier;
            None
        });
        bytes
    }
}

/// The record was held for as long as the caller could wait.
fn held() -> Error {
    Error::new(ErrorKind::Unavailable, "another session of the store holds the record").retry_after(RETRY_AFTER)
}

fn too_many() -> Error {
    let message = "too many calls are waiting for records that other sessions of the store hold";
    Error::new(ErrorKind::Overloaded, message).retry_after(RETRY_AFTER_FULL)
}
