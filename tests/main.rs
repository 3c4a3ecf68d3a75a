//! Integration tests: the real binary, real modules, real files. One binary, a file a question.

mod batches;
mod command_line;
mod convert;
mod demo;
mod failures;
mod faults;
mod flights;
mod folder;
mod forget;
mod hostile;
mod http;
mod interleave;
mod malformed;
mod order;
mod proof;
mod queries;
mod rebuild;
mod restart;
mod rollback;
mod sandbox;
mod storage;
mod support;
mod terminal;
mod tidy;
mod torture;
mod waiting;
