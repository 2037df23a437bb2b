//! The program inside the quickstart's example image: nothing but the kernel below it, so that the image
//! needs no base.
//!
//! `greeter prepare` is the build's RUN step: it prints a line every 300 ms. `greeter` greets.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

const STEPS: [&str; 5] = [
    "preparing the greeting: line 1 of 5, printed inside the build\n",
    "preparing the greeting: line 2 of 5, 300 ms later\n",
    "preparing the greeting: line 3 of 5, seen as it is printed\n",
    "preparing the greeting: line 4 of 5, almost there\n",
    "preparing the greeting: line 5 of 5, ready\n",
];
const GREETING: &str = "Hello from an image that Trailer registered, built and started.\n";
static PAUSE: TimeSpec = TimeSpec { seconds: 0, nanoseconds: 300_000_000 };

#[repr(C)]
struct TimeSpec {
    seconds: i64,
    nanoseconds: i64,
}

#[cfg(target_arch = "x86_64")]
mod call {
    pub const WRITE: usize = 1;
    pub const NANOSLEEP: usize = 35;
    pub const EXIT: usize = 60;
}

#[cfg(target_arch = "aarch64")]
mod call {
    pub const WRITE: usize = 64;
    pub const NANOSLEEP: usize = 101;
    pub const EXIT: usize = 93;
}

// The kernel starts a program with the number of its arguments on top of the stack.
#[cfg(target_arch = "x86_64")]
global_asm!(".globl _start", "_start:", "mov rdi, [rsp]", "and rsp, -16", "call {start}", start = sym start);

#[cfg(target_arch = "aarch64")]
global_asm!(".globl _start", "_start:", "ldr x0, [sp]", "bl {start}", start = sym start);

extern "C" fn start(arguments: usize) -> ! {
    if arguments > 1 {
        for step in &STEPS {
            print(step);
            system_call(call::NANOSLEEP, [&raw const PAUSE as usize, 0, 0]);
        }
    } else {
        print(GREETING);
    }
    exit(0)
}

fn print(text: &str) {
    system_call(call::WRITE, [1, text.as_ptr() as usize, text.len()]);
}

fn exit(code: usize) -> ! {
    loop {
        system_call(call::EXIT, [code, 0, 0]);
    }
}

#[cfg(target_arch = "x86_64")]
fn system_call(number: usize, [a, b, c]: [usize; 3]) -> usize {
    let result;
    // SAFETY: the three calls above read no memory but the texts and times of this file, and write none.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c,
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

#[cfg(target_arch = "aarch64")]
fn system_call(number: usize, [a, b, c]: [usize; 3]) -> usize {
    let result;
    // SAFETY: the three calls above read no memory but the texts and times of this file, and write none.
    unsafe {
        asm!("svc 0", in("x8") number, inlateout("x0") a => result, in("x1") b, in("x2") c, options(nostack));
    }
    result
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    exit(101)
}
