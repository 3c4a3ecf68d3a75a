//! The macros of `shadowbox-plugin`, which re-exports and documents them.
//!
//! - `view`: `#[derive(View)]`, a struct becomes a table.
//! - `events`: `#[derive(Events)]`, an enum becomes a subscription and a parser.
//! - `text_enum`: `#[derive(TextEnum)]`, an enum becomes a text column.
//! - `columns`: which columns of a batch a projection's function can use.
//! - `projection`: `#[projection]`, a function becomes a projection and, for `wasm32`, a component.
//! - `names`: the contract's rules for names and globs, checked while compiling.
//!
//! Whatever can be said before the plugin runs is said here, at the token that is wrong.

use proc_macro::TokenStream;
use quote::ToTokens;

mod columns;
mod events;
mod names;
mod projection;
mod text_enum;
mod view;

#[allow(missing_docs, reason = "documented where shadowbox-plugin re-exports it")]
#[proc_macro_derive(View, attributes(view))]
pub fn derive_view(input: TokenStream) -> TokenStream {
    expand(syn::parse(input).and_then(|input| view::expand(&input)))
}

#[allow(missing_docs, reason = "documented where shadowbox-plugin re-exports it")]
#[proc_macro_derive(Events, attributes(event, events))]
pub fn derive_events(input: TokenStream) -> TokenStream {
    expand(syn::parse(input).and_then(|input| events::expand(&input)))
}

#[allow(missing_docs, reason = "documented where shadowbox-plugin re-exports it")]
#[proc_macro_derive(TextEnum, attributes(text))]
pub fn derive_text_enum(input: TokenStream) -> TokenStream {
    expand(syn::parse(input).and_then(|input| text_enum::expand(&input)))
}

#[allow(missing_docs, reason = "documented where shadowbox-plugin re-exports it")]
#[proc_macro_attribute]
pub fn projection(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let arguments = syn::parse(arguments);
    expand(arguments.and_then(|arguments| projection::expand(&arguments, syn::parse(item)?)))
}

fn expand(result: syn::Result<impl ToTokens>) -> TokenStream {
    match result {
        Ok(tokens) => tokens.into_token_stream().into(),
        Err(error) => error.into_compile_error().into(),
    }
}
