// SPDX-License-Identifier: Apache-2.0
//! Work on hostile input with an end to its time and its memory.
//!
//! Neither can be taken back from Rust code that is running: an allocation that fails aborts the process, and a thread
//! cannot be stopped. So the work runs on a thread of its own; when it asks for too much memory, the allocator puts that
//! thread to sleep for ever, and when it takes too long nobody waits for it any more. Either way the caller gets an error
//! and the process lives on; what the thread held is lost until the process ends.

use crate::{quietly, Result};
use mimalloc::MiMalloc;
use std::alloc::{GlobalAlloc, Layout};
use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Sender};
use std::sync::Arc;
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

#[derive(Clone, Copy)]
pub struct Containment {
    pub megabytes: i64,
    pub seconds: u64,
}

struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

thread_local! {
    /// Bytes this thread may still allocate. Cells without a destructor, so that the allocator may look at them always.
    static LEFT: Cell<i64> = const { Cell::new(i64::MAX) };
    static SIGNAL: Cell<*const Signal> = const { Cell::new(std::ptr::null()) };
}

struct Signal {
    out_of_memory: AtomicBool,
    caller: Thread,
}

fn charge(bytes: i64) {
    let left = LEFT.get().saturating_sub(bytes);
    LEFT.set(left);
    if left < 0 {
        LEFT.set(i64::MAX);
        let signal = SIGNAL.get();
        if !signal.is_null() {
            // SAFETY: points into an Arc that this thread's own loop holds.
            unsafe {
                (*signal).out_of_memory.store(true, Ordering::Release);
                (*signal).caller.unpark();
            }
            loop {
                thread::park();
            }
        }
    }
}

// SAFETY: all memory is MiMalloc's; `charge` allocates nothing and does not unwind.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        charge(layout.size() as i64);
        MiMalloc.alloc(layout)
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        charge(layout.size() as i64);
        MiMalloc.alloc_zeroed(layout)
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LEFT.set(LEFT.get().saturating_add(layout.size() as i64));
        MiMalloc.dealloc(pointer, layout)
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        charge(size as i64 - layout.size() as i64);
        MiMalloc.realloc(pointer, layout, size)
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// The thread that works for one calling thread. It ends when the caller's thread does.
struct Worker {
    jobs: Sender<Job>,
    signal: Arc<Signal>,
}

thread_local! {
    static WORKER: RefCell<Option<Worker>> = const { RefCell::new(None) };
}

const STACK_BYTES: usize = 64 << 20; // reserved, not used: what the deepest template and tokenizer allowed could need

fn start() -> Result<Worker> {
    let (jobs, inbox) = channel::<Job>();
    let signal = Arc::new(Signal { out_of_memory: AtomicBool::new(false), caller: thread::current() });
    let own = Arc::clone(&signal);
    let work = move || {
        SIGNAL.set(Arc::as_ptr(&own));
        for job in inbox {
            job();
        }
    };
    thread::Builder::new()
        .name("text bridge".into())
        .stack_size(STACK_BYTES)
        .spawn(work)
        .map_err(|error| format!("no thread could be started: {error}"))?;
    Ok(Worker { jobs, signal })
}

pub fn contained<T: Send + 'static>(limits: Containment, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let worker = match WORKER.take() {
        Some(worker) => worker,
        None => start()?,
    };
    let (reply, replies) = channel();
    let caller = thread::current();
    let job = move || {
        LEFT.set(limits.megabytes << 20);
        let result = quietly(work);
        LEFT.set(i64::MAX);
        let _ = reply.send(result);
        caller.unpark();
    };
    worker.jobs.send(Box::new(job)).map_err(|_| String::from("the worker thread is gone"))?;
    let end = Instant::now() + Duration::from_secs(limits.seconds);
    loop {
        if let Ok(result) = replies.try_recv() {
            WORKER.set(Some(worker)); // only a worker that is free again is kept
            return result;
        }
        if worker.signal.out_of_memory.load(Ordering::Acquire) {
            return Err(format!("it needs more than {} MiB of memory", limits.megabytes));
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("it takes longer than {} seconds", limits.seconds));
        }
        thread::park_timeout(left);
    }
}
