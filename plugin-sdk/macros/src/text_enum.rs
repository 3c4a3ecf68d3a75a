//! `#[derive(TextEnum)]`

use proc_macro2::TokenStream;
use quote::quote;
use syn::ext::IdentExt;
use syn::{Data, DeriveInput, Error, Fields, LitStr, Result};

use crate::names::snake_case;

pub(crate) fn expand(input: &DeriveInput) -> Result<TokenStream> {
    let Data::Enum(data) = &input.data else {
        return Err(Error::new(input.ident.span(), "only an enum can be a TextEnum; a struct fits into a Json<T>"));
    };
    let (mut variants, mut texts) = (Vec::new(), Vec::<String>::new());
    for variant in &data.variants {
        if !matches!(variant.fields, Fields::Unit) {
            let why = "a variant of a TextEnum is stored as its name, so it has no fields; use Json<T> to store them";
            return Err(Error::new(variant.ident.span(), why));
        }
        let mut text = snake_case(&variant.ident.unraw().to_string());
        for attribute in variant.attrs.iter().filter(|attribute| attribute.path().is_ident("text")) {
            text = attribute.parse_args::<LitStr>()?.value();
        }
        if texts.contains(&text) {
            return Err(Error::new(variant.ident.span(), format!("two variants have the text `{text}`")));
        }
        variants.push(&variant.ident);
        texts.push(text);
    }
    if variants.is_empty() {
        return Err(Error::new(input.ident.span(), "a TextEnum needs a variant"));
    }
    let (sdk, name) = (quote!(::shadowbox_plugin), &input.ident);
    let result = quote!(::core::result::Result);
    Ok(quote! {
        #[automatically_derived]
        impl #sdk::TextEnum for #name {
            fn as_text(self) -> &'static str {
                match self { #(Self::#variants => #texts,)* }
            }
            fn from_text(text: &str) -> ::core::option::Option<Self> {
                match text {
                    #(#texts => ::core::option::Option::Some(Self::#variants),)*
                    _ => ::core::option::Option::None,
                }
            }
        }

        #[automatically_derived]
        impl #sdk::column::Column for #name {
            const TYPE: #sdk::column::ColumnType = #sdk::column::ColumnType::Text;
            fn encode(&self, out: &mut ::std::vec::Vec<u8>) -> #result<(), #sdk::Error> {
                #sdk::column::text_enum::encode(*self, out);
                #result::Ok(())
            }
            fn decode(input: &mut &[u8]) -> #result<Self, #sdk::Error> {
                #sdk::column::text_enum::decode(input)
            }
        }

        #[automatically_derived]
        impl #sdk::column::KeyColumn for #name {
            type Key<'k> = Self;
            fn as_key(&self) -> Self {
                *self
            }
            fn from_key(key: Self) -> Self {
                key
            }
            fn is_key(&self, key: Self) -> bool {
                #sdk::column::KeyColumn::order(self, &key).is_eq()
            }
            fn hash_key(key: Self, hasher: &mut #sdk::__private::KeyHasher) {
                hasher.bytes(#sdk::TextEnum::as_text(key).as_bytes());
            }
            fn encode_key(key: Self, out: &mut ::std::vec::Vec<u8>) {
                #sdk::column::text_enum::encode(key, out);
            }
            fn order(&self, other: &Self) -> ::core::cmp::Ordering {
                ::core::cmp::Ord::cmp(#sdk::TextEnum::as_text(*self), #sdk::TextEnum::as_text(*other))
            }
        }
    })
}
