//! What a plugin author relies on, seen from outside. What the compiler says about mistakes is in `ui/`.

mod behaviour;
#[cfg(not(target_arch = "wasm32"))]
mod compile;
mod tutorial;
