//! The keys of a run: few, so that everybody meets at them.

use crate::history::Class;

/// How many keys there are of each class.
const CLASSES: [(Class, &str, usize); 4] = [
    (Class::Through, "through", 30),
    (Class::Behind, "behind", 6),
    (Class::Mixed, "mixed", 6),
    (Class::Counter, "counter", 3),
];

/// The first keys that are written only through, and often. The others of that class are written now and then: a copy of one that is stale
/// stays so until something is done about it, and not just until the next write.
const BUSY: usize = 6;

/// Whether a key is written now and then.
pub fn is_quiet(key: usize) -> bool {
    (BUSY..CLASSES[0].2).contains(&key)
}

/// The classes of all keys, by number.
pub fn classes() -> Vec<Class> {
    let of_class = |(class, _, count): &(Class, &str, usize)| vec![*class; *count];
    CLASSES.iter().flat_map(of_class).collect()
}

/// The namespace of a key: one for each class.
pub fn namespace(class: Class) -> &'static str {
    let named = CLASSES.iter().find(|(other, ..)| *other == class);
    named.expect("every class has a namespace").1
}

/// Its name.
pub fn name(key: usize) -> String {
    format!("k{key:02}")
}

/// The key of a row.
pub fn parse(namespace: &str, key: &str) -> Option<usize> {
    let number: usize = key.strip_prefix('k')?.parse().ok()?;
    let classes = classes();
    (classes
        .get(number)
        .is_some_and(|class| self::namespace(*class) == namespace)
        && name(number) == key)
        .then_some(number)
}
