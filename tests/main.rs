//! Integration tests: the real binary, real modules, real files. One binary, a file a question.



mod flights;


mod rebuild;
mod restart;
mod sandbox;
mod support;

