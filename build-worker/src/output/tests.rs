//! Tests of the conversion of progress to events.

use proto::dispatch::LineStart::{self, Continuation, NewLine, Replacement};

use super::*;

fn output(output: &mut Output, text: &str) -> Vec<Event> {
    let mut events = Vec::new();
    let progress =
        Progress::Output { step: "a".to_owned(), stderr: false, bytes: text.as_bytes().to_vec(), at: None };
    output.take(progress, Instant::now(), &mut events);
    events.into_iter().map(|(_, event)| event).collect()
}

fn finish(output: &mut Output) -> Vec<Event> {
    let mut events = Vec::new();
    output.finish(&mut events);
    events.into_iter().map(|(_, event)| event).collect()
}

fn texts(events: &[Event]) -> Vec<String> {
    let text = |event: &Event| match event {
        Event::Line(line) => line.text.clone(),
        Event::Gap(gap) => format!("<{}>", gap.lines),
        Event::Started(_)
        | Event::Step(_)
        | Event::Built(_)
        | Event::Succeeded(_)
        | Event::Failed(_)
        | Event::HandedBack(_)
        | Event::Stopped(_) => "no output".to_owned(),
    };
    events.iter().map(text).collect()
}

/// Returns the number of events for a state of the step `a`, `second` being the engine's clock.
fn step(output: &mut Output, state: StepState, second: i64) -> usize {
    let mut events = Vec::new();
    let progress = Progress::Step {
        id: "a".to_owned(),
        name: "[1/1] RUN".to_owned(),
        state,
        error: if state == StepState::Failed { "exit code: 1".to_owned() } else { String::new() },
        at: Some(Timestamp { seconds: second, nanos: 0 }),
    };
    output.take(progress, Instant::now(), &mut events);
    events.len()
}

#[test]
fn bytes_become_lines_wherever_they_are_cut() {
    let mut log = Output::new(1_000_000);
    assert_eq!(texts(&output(&mut log, "on")), [""; 0]);
    assert_eq!(texts(&output(&mut log, "e\r\n\ntw")), ["one", ""]);
    assert_eq!(texts(&finish(&mut log)), ["tw"]);
}

#[test]
fn a_line_goes_on_after_the_end_of_its_step() {
    let mut log = Output::new(1_000_000);
    step(&mut log, StepState::Started, 1);
    assert_eq!(texts(&output(&mut log, "on")), [""; 0]);
    assert_eq!(step(&mut log, StepState::Done, 2), 1);
    assert_eq!(texts(&output(&mut log, "e\ntwo")), ["one"]);
    assert_eq!(texts(&finish(&mut log)), ["two"]);
}

#[test]
fn a_line_without_end_is_cut() {
    let mut log = Output::new(1_000_000);
    let lines = texts(&output(&mut log, &"x".repeat(2 * Stream::MAX_PIECE + 5)));
    assert_eq!(lines.iter().map(String::len).collect::<Vec<_>>(), [Stream::MAX_PIECE; 2]);
    assert_eq!(texts(&finish(&mut log)), ["xxxxx"]);
}

#[test]
fn a_log_over_its_limit_keeps_its_beginning_and_its_end() {
    let mut log = Output::new(2 * (32 + 5));
    let line = "y".repeat(1_000 - 32);
    assert_eq!(texts(&output(&mut log, "12345\n67890\n\n")), ["12345", "67890"]);
    for _ in 0..100 {
        assert_eq!(texts(&output(&mut log, &format!("{line}\n"))), [""; 0]);
    }
    output(&mut log, "end\n");
    let rest = texts(&finish(&mut log));
    let kept = Tail::BYTES / 1_000;
    assert_eq!(rest.len(), 1 + kept + 1);
    assert_eq!(rest[0], format!("<{}>", 101 - kept));
    assert_eq!(rest.last().map(String::as_str), Some("end"));
}

#[test]
fn a_step_says_each_state_once() {
    let mut log = Output::new(10);
    assert_eq!(step(&mut log, StepState::Pending, 0), 1);
    assert_eq!(step(&mut log, StepState::Pending, 0), 0);
    assert_eq!(step(&mut log, StepState::Started, 1), 1);
    assert_eq!(step(&mut log, StepState::Done, 2), 1);
    assert_eq!(step(&mut log, StepState::Started, 1), 0);
    assert!(log.steps_under_way().is_empty(), "what the engine repeats is not another run");
    assert_eq!(step(&mut log, StepState::Done, 2), 0);
    assert!(log.failed_step().is_none());
}

#[test]
fn a_step_that_runs_again_and_fails_has_failed() {
    let mut log = Output::new(1_000);
    step(&mut log, StepState::Started, 1);
    step(&mut log, StepState::Done, 2);
    step(&mut log, StepState::Started, 3);
    assert_eq!(log.steps_under_way().len(), 1);
    output(&mut log, "last words\n");
    assert_eq!(step(&mut log, StepState::Failed, 4), 1);
    assert!(log.steps_under_way().is_empty());
    let failed = log.failed_step().expect("it failed");
    assert_eq!((failed.name.as_str(), failed.last_lines), ("[1/1] RUN", vec!["last words".to_owned()]));
}

#[test]
fn the_step_that_ran_longest_is_interrupted_with_its_last_lines() {
    let mut log = Output::new(1_000);
    for (id, second) in [("late", 7), ("early", 5), ("over", 3)] {
        let state = |state, second| Progress::Step {
            id: id.to_owned(),
            name: format!("RUN {id}"),
            state,
            error: String::new(),
            at: Some(Timestamp { seconds: second, nanos: 0 }),
        };
        log.take(state(StepState::Started, second), Instant::now(), &mut Vec::new());
        let bytes = format!("out of {id}\nand ").into_bytes();
        let printed = Progress::Output { step: id.to_owned(), stderr: false, bytes, at: None };
        log.take(printed, Instant::now(), &mut Vec::new());
        if id == "over" {
            log.take(state(StepState::Done, second + 1), Instant::now(), &mut Vec::new());
        }
    }
    assert!(log.interrupted_step().is_none());
    log.interrupt();
    let bytes = b"more".to_vec();
    log.take(
        Progress::Output { step: "early".to_owned(), stderr: false, bytes, at: None },
        Instant::now(),
        &mut Vec::new(),
    );
    finish(&mut log);
    let step = log.interrupted_step().expect("a step was running");
    assert_eq!(step.name, "RUN early");
    assert_eq!(step.last_lines, ["out of early", "and more"]);
}

/// Returns the lines and pieces that are reported once nothing more is printed for some time.
fn unfinished(output: &mut Output) -> Vec<(LineStart, String)> {
    let mut events = Vec::new();
    output.report_unfinished(Instant::now() + Stream::DELAY, &mut events);
    pieces(events.into_iter().map(|(_, event)| event).collect())
}

/// Returns the lines and pieces among events.
fn pieces(events: Vec<Event>) -> Vec<(LineStart, String)> {
    let piece = |event| if let Event::Line(line) = event { Some((line.start(), line.text)) } else { None };
    events.into_iter().filter_map(piece).collect()
}

fn piece(start: LineStart, text: &str) -> (LineStart, String) {
    (start, text.to_owned())
}

#[test]
fn a_prompt_is_reported_while_it_waits() {
    let mut log = Output::new(1_000_000);
    assert_eq!(output(&mut log, "Geographic area: "), []);
    log.report_unfinished(Instant::now(), &mut Vec::new());
    assert_eq!(unfinished(&mut log), [piece(NewLine, "Geographic area: ")]);
    assert_eq!(unfinished(&mut log), [], "it is reported once");
    assert_eq!(pieces(output(&mut log, "6\nCity: ")), [piece(Continuation, "6")]);
    assert_eq!(unfinished(&mut log), [piece(NewLine, "City: ")]);
    assert_eq!(output(&mut log, "\n"), [], "the end of a reported line needs no event");
    assert_eq!(pieces(output(&mut log, "done\n")), [piece(NewLine, "done")]);
}

#[test]
fn progress_by_carriage_returns_is_reported_state_by_state() {
    let mut log = Output::new(1_000_000);
    assert_eq!(output(&mut log, "\r10 %\r20 %"), []);
    assert_eq!(unfinished(&mut log), [piece(NewLine, "20 %")]);
    assert_eq!(output(&mut log, "\r30 %\r40 %\r"), []);
    assert_eq!(unfinished(&mut log), [piece(Replacement, "40 %")]);
    assert_eq!(output(&mut log, "\r\r50"), []);
    assert_eq!(unfinished(&mut log), [piece(Replacement, "50")]);
    assert_eq!(
        pieces(output(&mut log, " %\r\n\r\nnext\n")),
        [piece(Continuation, " %"), piece(NewLine, ""), piece(NewLine, "next")]
    );
    assert_eq!(pieces(output(&mut log, "1\r2\r3\n")), [piece(NewLine, "3")], "the last state is kept");
}

#[test]
fn a_clip_ends_its_line() {
    let mut log = Output::new(1_000_000);
    output(&mut log, "cut he");
    let mut events = Vec::new();
    let message = "[output clipped]".to_owned();
    log.take(
        Progress::Clip { step: "a".to_owned(), stderr: false, message, at: None },
        Instant::now(),
        &mut events,
    );
    let events: Vec<Event> = events.into_iter().map(|(_, event)| event).collect();
    assert_eq!(texts(&events), ["cut he", "<0>"]);
    assert_eq!(pieces(output(&mut log, "re\n")), [piece(NewLine, "re")]);
}

#[test]
fn a_line_without_its_beginning_is_not_appended_to_another() {
    let mut log = Output::new(32 + "first\n".len());
    output(&mut log, "first\n");
    output(&mut log, &"x".repeat(Tail::BYTES * 2));
    let rest = pieces(finish(&mut log));
    let starts: Vec<LineStart> = rest.into_iter().map(|(start, _)| start).collect();
    assert_eq!(starts[0], NewLine);
    assert!(starts.len() > 2 && starts[1..].iter().all(|start| *start == Continuation), "{starts:?}");
}

/// Returns the lines that a terminal shows of what was printed.
fn shown(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes).replace('\0', "\u{fffd}");
    let show = |line: &str| line.split('\r').rfind(|state| !state.is_empty()).unwrap_or_default().to_owned();
    let mut lines: Vec<String> = text.split('\n').map(show).collect();
    // What follows the last line end is a line if something was printed.
    lines.pop_if(|line| line.is_empty());
    lines
}

/// Prints parts that are hard to cut, of about 100 KB.
fn printed(random: &mut fastrand::Rng) -> Vec<u8> {
    const PARTS: [&[u8]; 17] = [
        b"\0",
        b"a",
        "ä".as_bytes(),
        "€".as_bytes(),
        "😀".as_bytes(),
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"\x1b[2K",
        b"\x1b[1;31m",
        b"\xff",
        b"\xe2\x82",
        b"\xf0\x9f\x98",
        b"\xc3",
        b"\xed\xa0\x80",
        b"[output clipped, log ",
    ];
    const EDGES: [usize; 4] = [16 * 1024, 32 * 1024, 48 * 1024, 64 * 1024];
    let mut bytes = Vec::new();
    for _ in 0..random.usize(1..60) {
        if random.u8(0..20) == 0 {
            let unit = ["x", "ä", "€", "😀", "\0"][random.usize(0..5)];
            let length = EDGES[random.usize(0..4)] + random.usize(0..8) - 4;
            bytes.extend(unit.repeat(length / unit.len()).into_bytes());
        } else {
            bytes.extend_from_slice(PARTS[random.usize(0..PARTS.len())]);
        }
    }
    bytes
}

#[test]
fn joined_pieces_are_what_was_printed_wherever_it_is_cut() {
    for seed in 0..400 {
        let mut random = fastrand::Rng::with_seed(seed);
        let printed = [printed(&mut random), printed(&mut random)];
        let mut rests = printed.each_ref().map(Vec::as_slice);
        let mut log = Output::new(100_000_000);
        let mut events = Vec::new();
        while rests.iter().any(|rest| !rest.is_empty()) {
            let stream = usize::from(random.bool());
            let limit = [1, 3, 100, 40_000][random.usize(0..4)];
            let (chunk, rest) = rests[stream].split_at(random.usize(0..=limit).min(rests[stream].len()));
            rests[stream] = rest;
            let bytes = chunk.to_vec();
            let progress = Progress::Output { step: "a".to_owned(), stderr: stream == 1, bytes, at: None };
            log.take(progress, Instant::now(), &mut events);
            if random.bool() {
                log.report_unfinished(Instant::now() + Stream::DELAY, &mut events);
            }
        }
        log.finish(&mut events);
        let mut joined = [Vec::<String>::new(), Vec::new()];
        for (_, event) in events {
            let Event::Line(line) = event else { panic!("{event:?} is not output") };
            assert!(line.text.len() <= Stream::MAX_PIECE);
            let lines = &mut joined[usize::from(line.stderr)];
            match line.start() {
                NewLine => lines.push(line.text),
                Continuation => lines.last_mut().expect("a line to continue").push_str(&line.text),
                Replacement => *lines.last_mut().expect("a line to replace") = line.text,
                LineStart::Unspecified => panic!("every line has a start"),
            }
        }
        for (joined, printed) in joined.iter().zip(&printed) {
            assert!(*joined == shown(printed), "seed {seed}: {joined:?}");
        }
    }
}
