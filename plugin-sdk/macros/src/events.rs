//! `#[derive(Events)]`

use proc_macro2::TokenStream;
use quote::quote;
use syn::parse::{Parse, ParseStream};
use syn::{Attribute, Data, DeriveInput, Error, Fields, Ident, LitStr, Result, Token, Variant};

use crate::names::is_glob;

/// `#[event("A", "B*", source = "orders")]`
struct Arguments {
    types: Vec<LitStr>,
    source: Option<LitStr>,
}

impl Parse for Arguments {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let mut arguments = Self { types: Vec::new(), source: None };
        while !input.is_empty() {
            if input.peek(LitStr) {
                arguments.types.push(input.parse()?);
            } else {
                let name: Ident = input.parse()?;
                if name != "source" {
                    return Err(Error::new(name.span(), "expected event types and source = \"...\""));
                }
                input.parse::<Token![=]>()?;
                arguments.source = Some(input.parse()?);
            }
            if !input.is_empty() {
                input.parse::<Token![,]>()?;
            }
        }
        Ok(arguments)
    }
}

struct Subscription {
    source: LitStr,
    source_glob: bool,
    event_type: LitStr,
    type_glob: bool,
    variant: u16,
}

pub(crate) fn expand(input: &DeriveInput) -> Result<TokenStream> {
    let Data::Enum(data) = &input.data else {
        return Err(Error::new(input.ident.span(), "Events is for an enum: one variant for each event"));
    };
    if data.variants.is_empty() {
        return Err(Error::new(input.ident.span(), "a projection without events has nothing to do: add a variant"));
    }
    let lifetimes = input.generics.lifetimes().count();
    if lifetimes > 1 || input.generics.params.len() > lifetimes {
        let why = "the enum may have one lifetime, which is the batch's, and no other parameters";
        return Err(Error::new_spanned(&input.generics.params, why));
    }
    let default_source = default_source(&input.attrs)?;
    let of = &input.ident;
    let (mut subscriptions, mut arms) = (Vec::new(), Vec::new());
    let parses = !data.variants.iter().all(|variant| matches!(variant.fields, Fields::Unit));
    for (i, variant) in data.variants.iter().enumerate() {
        let index = u16::try_from(i).map_err(|_| Error::new(variant.ident.span(), "too many variants"))?;
        subscribe(variant, index, default_source.as_ref(), &mut subscriptions)?;
        let name = &variant.ident;
        arms.push(match &variant.fields {
            Fields::Unit => quote!(#index => ::core::result::Result::Ok(#of::#name),),
            Fields::Unnamed(fields) if fields.unnamed.len() == 1 => {
                quote!(#index => payload.json().map(#of::#name),)
            }
            _ => {
                let why = "a variant holds its payload as one value, such as `Placed(OrderPlaced)`, or nothing";
                return Err(Error::new(name.span(), why));
            }
        });
    }
    Ok(implement(input, &subscriptions, parses, &arms))
}

fn default_source(attributes: &[Attribute]) -> Result<Option<LitStr>> {
    let mut source = None;
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("events")) {
        attribute.parse_nested_meta(|meta| {
            if !meta.path.is_ident("source") {
                return Err(meta.error("expected source = \"...\""));
            }
            source = Some(meta.value()?.parse()?);
            Ok(())
        })?;
    }
    Ok(source)
}

fn subscribe(
    variant: &Variant,
    index: u16,
    default_source: Option<&LitStr>,
    all: &mut Vec<Subscription>,
) -> Result<()> {
    let mut attributes = variant.attrs.iter().filter(|attribute| attribute.path().is_ident("event")).peekable();
    if attributes.peek().is_none() {
        let why = "say which event this is: #[event(\"Type\", source = \"...\")]";
        return Err(Error::new(variant.ident.span(), why));
    }
    // Several attributes are for the same variant in several sources.
    for attribute in attributes {
        let arguments: Arguments = attribute.parse_args()?;
        if arguments.types.is_empty() {
            return Err(Error::new_spanned(attribute, "name the event's type: #[event(\"Type\", source = \"...\")]"));
        }
        let Some(source) = arguments.source.as_ref().or(default_source) else {
            let why = "say which source has this event: #[event(\"Type\", source = \"...\")] here, or \
                       #[events(source = \"...\")] on the enum for all its variants";
            return Err(Error::new_spanned(attribute, why));
        };
        if source.value().is_empty() {
            return Err(Error::new(source.span(), "a source's name is not empty"));
        }
        let source_glob = is_glob(source, "a source")?;
        for event_type in arguments.types {
            let type_glob = is_glob(&event_type, "an event type")?;
            let same = |before: &&Subscription| {
                before.source.value() == source.value() && before.event_type.value() == event_type.value()
            };
            if all.iter().find(same).is_some() {
                let why = format!("`{}` of `{}` is subscribed to already", event_type.value(), source.value());
                return Err(Error::new(event_type.span(), why));
            }
            all.push(Subscription { source: source.clone(), source_glob, event_type, type_glob, variant: index });
        }
    }
    Ok(())
}

fn implement(input: &DeriveInput, subscriptions: &[Subscription], parses: bool, arms: &[TokenStream]) -> TokenStream {
    let (sdk, name) = (quote!(::shadowbox_plugin), &input.ident);
    let (of_any, of_batch) = match input.generics.lifetimes().next() {
        Some(_) => (quote!(<'_>), quote!(<'a>)),
        None => (quote!(), quote!()),
    };
    let subscriptions = subscriptions.iter().map(|subscription| {
        let Subscription { source, source_glob, event_type, type_glob, variant } = subscription;
        quote!(#sdk::__private::Subscription {
            source: #source,
            source_glob: #source_glob,
            event_type: #event_type,
            type_glob: #type_glob,
            variant: #variant,
        })
    });
    quote! {
        #[automatically_derived]
        impl #sdk::Events for #name #of_any {
            type Of<'a> = #name #of_batch;
            const SUBSCRIPTIONS: &'static [#sdk::__private::Subscription] = &[#(#subscriptions),*];
            const PARSES: bool = #parses;

            fn parse<'a>(
                variant: u16,
                payload: #sdk::__private::Payload<'a>,
            ) -> ::core::result::Result<Self::Of<'a>, #sdk::Error> {
                match variant {
                    #(#arms)*
                    _ => ::core::unreachable!("a subscription names the index of a variant"),
                }
            }
        }
    }
}
