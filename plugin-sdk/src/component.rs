//! The component's side of the contract: bindings to the host, and the exports.

use std::any::Any;
use std::cell::RefCell;
use std::rc::Rc;

use crate::cache::Limits;
use crate::projection::{Instance, Projection};
use crate::views::Store;

#[allow(
    unsafe_code,
    missing_docs,
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    reason = "generated; its shape is wit-bindgen's"
)]
mod generated {
    wit_bindgen::generate!({
        path: "../wit",
        world: "plugin",
        pub_export_macro: true,
        default_bindings_module: "shadowbox_plugin::__private::bindings",
        runtime_path: "wit_bindgen::rt",
    });
}

pub use generated::*;

use generated::exports::shadowbox::plugin::projection::{Failure, Guest};
use generated::shadowbox::plugin::host;

struct Host;

impl Store for Host {
    fn get(&self, view: u32, key: &[u8]) -> Option<Vec<u8>> {
        host::get(view, key)
    }
    fn get_many(&self, view: u32, keys: &[u8]) -> Vec<u8> {
        host::get_many(view, keys)
    }
}

thread_local! {
    // A component has one projection, but a static cannot be generic: so the type is erased.
    static INSTANCE: RefCell<Option<Box<dyn Any>>> = const { RefCell::new(None) };
}

fn new_instance<P: Projection>() -> Instance<P> {
    let definition = P::definition();
    let host: Rc<dyn Store> = Rc::new(Host);
    Instance::new(&definition, &host, Limits::for_views(definition.views.len()))
}

impl<P: Projection> Guest for P {
    fn describe() -> String {
        crate::manifest::of::<P>()
    }

    fn apply(batch: Vec<u8>) -> Result<Vec<u8>, Failure> {
        INSTANCE.with_borrow_mut(|slot| {
            let instance = slot.get_or_insert_with(|| Box::new(new_instance::<P>()));
            let instance: &mut Instance<P> = instance.downcast_mut().expect("a component has one projection");
            let done = instance.apply(&batch);
            if done.is_err() {
                // The host drops the component now. Should it ever not, then no half-applied row may stay.
                *slot = None;
            }
            done.map_err(|failure| Failure { event: failure.event, message: failure.message })
        })
    }
}
