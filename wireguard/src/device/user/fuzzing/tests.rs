use proptest::prelude::*;

use super::*;

/// What was found once: `fuzz/finds/<program>/`.
fn finds(program: &str) -> Vec<(String, Vec<u8>)> {
    let directory = format!("{}/../fuzz/finds/{program}", env!("CARGO_MANIFEST_DIR"));
    let Ok(entries) = std::fs::read_dir(&directory) else { return Vec::new() };
    let read =
        |entry: std::fs::DirEntry| (entry.path().display().to_string(), std::fs::read(entry.path()).unwrap());
    entries.map(|entry| read(entry.unwrap())).collect()
}

fn play(program: &str, seeds: Vec<(&'static str, Vec<u8>)>, run: fn(&[u8])) {
    for (name, input) in seeds.into_iter().map(|(name, input)| (name.to_owned(), input)).chain(finds(program))
    {
        println!("{name}");
        run(&input);
    }
}

#[test]
fn what_leads_deep_and_what_was_found_once_holds() {
    play("wireguard_datagrams", datagram_seeds(), datagrams);
    play("wireguard_cut", cuts(), cut);
    play("wireguard_join", joins(), join);
}

/// A seed with some of its bytes changed.
fn changed(seeds: Vec<(&'static str, Vec<u8>)>) -> impl Strategy<Value = Vec<u8>> {
    let changes = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8);
    (prop::sample::select(seeds), changes).prop_map(|((_, mut input), changes)| {
        for (at, value) in changes {
            let at = at.index(input.len());
            input[at] = value;
        }
        input
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn plays_that_are_a_little_different_hold(input in changed(datagram_seeds())) {
        datagrams(&input);
    }
}

proptest! {
    #[test]
    fn frames_that_are_a_little_different_are_cut_and_joined(frame in changed(cuts()), packets in changed(joins())) {
        cut(&frame);
        join(&packets);
    }
}
