//! `#[projection]`

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::{Error, FnArg, Ident, ItemFn, LitInt, LitStr, Path, Result, ReturnType, Token, Type};

/// `name = "carriers", version = 1, views(Carrier, FlightCarrier), forgotten`
pub(crate) struct Arguments {
    name: LitStr,
    version: LitInt,
    views: Vec<Path>,
    forgotten: bool,
}

impl Parse for Arguments {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let (mut name, mut version, mut views, mut forgotten) = (None, None, None, false);
        while !input.is_empty() {
            let argument: Ident = input.parse()?;
            if argument == "name" {
                input.parse::<Token![=]>()?;
                name = Some(input.parse()?);
            } else if argument == "version" {
                input.parse::<Token![=]>()?;
                version = Some(input.parse()?);
            } else if argument == "views" {
                let content;
                syn::parenthesized!(content in input);
                views = Some(Punctuated::<Path, Token![,]>::parse_terminated(&content)?);
            } else if argument == "forgotten" {
                forgotten = true;
            } else {
                return Err(Error::new(
                    argument.span(),
                    "expected name = \"...\", version = 1, views(...) or forgotten",
                ));
            }
            if !input.is_empty() {
                input.parse::<Token![,]>()?;
            }
        }
        let needs = |what: &str| Error::new(input.span(), format!("a projection needs {what}"));
        let name = name.ok_or_else(|| needs("a name: name = \"...\""))?;
        let version: LitInt = version.ok_or_else(|| needs("a version: version = 1"))?;
        let views = views.unwrap_or_default();
        crate::names::check_projection(&name)?;
        if version.base10_parse::<u32>()? == 0 {
            return Err(Error::new(version.span(), "a version is 1 or more"));
        }
        if views.is_empty() {
            return Err(needs("the views that it maintains: views(Row, ...)"));
        }
        Ok(Self { name, version, views: views.into_iter().collect(), forgotten })
    }
}

pub(crate) fn expand(arguments: &Arguments, function: ItemFn) -> Result<TokenStream> {
    check_signature(&function)?;
    let Arguments { name: projection, version, views, forgotten } = arguments;
    let (sdk, name, visibility) = (quote!(::shadowbox_plugin), &function.sig.ident, &function.vis);
    let docs: Vec<_> = function.attrs.iter().filter(|attribute| attribute.path().is_ident("doc")).collect();
    let names = views.iter().map(|view| quote_spanned!(view.span()=> <#view as ::shadowbox_plugin::View>::SCHEMA.name));
    let views = views.iter().map(|view| quote_spanned!(view.span()=> .view::<#view>()));
    let wanted = crate::columns::wanted(&function);
    if let Some(span) = wanted.as_ref().and_then(|wanted| wanted.forgotten)
        && !forgotten
    {
        return Err(Error::new(span, "say `forgotten` in #[projection(...)] to get such events"));
    }
    let columns = wanted.map(|wanted| wanted.columns).map(|columns| quote!(.reads(&[#(#columns),*])));
    let forgotten = forgotten.then(|| quote!(.forgotten()));
    let mut function_inside = function.clone();
    function_inside.vis = syn::Visibility::Inherited;
    Ok(quote! {
        #(#docs)*
        #[allow(non_camel_case_types, reason = "it has the name of the function that it stands for")]
        #[derive(Clone, Copy, Debug)]
        #visibility struct #name {}

        // A function, not a unit struct: nobody could name a variable like a unit struct.
        #(#docs)*
        #[allow(dead_code, reason = "only tests name it")]
        #visibility fn #name() -> #name {
            #name {}
        }

        const _: () = {
            const _: () = #sdk::__private::assert_distinct(&[#(#names),*]);

            #function_inside

            impl #sdk::Projection for #name {
                const NAME: &'static str = #projection;
                const VERSION: u32 = #version;

                fn definition() -> #sdk::__private::Definition {
                    #sdk::__private::Definition::new(#sdk::__private::takes(#name)) #columns #forgotten #(#views)*
                }
                fn run(
                    batch: &#sdk::__private::Batch<'_>,
                    views: &mut #sdk::Views,
                ) -> ::core::result::Result<(), #sdk::__private::Failure> {
                    #sdk::__private::fold(#sdk::__private::takes(#name), #name, batch, views)
                }
            }
        };

        // The names that a component exports hold a `:`, which the linkers of other targets refuse.
        #[cfg(target_arch = "wasm32")]
        #sdk::__private::export!(#name with_types_in #sdk::__private::bindings);
    })
}

/// Refuses what could only be reported as a mismatch of types inside the expansion.
fn check_signature(function: &ItemFn) -> Result<()> {
    let signature = &function.sig;
    let wrong = |span: proc_macro2::Span| {
        let shape = format!("fn {}(event: Event<YourEvents>, views: &mut Views) -> Result<()>", signature.ident);
        Err(Error::new(span, format!("a projection is a function like `{shape}`")))
    };
    if let Some(keyword) = &signature.asyncness {
        return wrong(keyword.span());
    }
    if signature.unsafety.is_some() || signature.constness.is_some() || signature.abi.is_some() {
        return wrong(signature.span());
    }
    if signature.generics.type_params().next().is_some() || signature.generics.const_params().next().is_some() {
        return wrong(signature.generics.span());
    }
    let types: Vec<&Type> = signature
        .inputs
        .iter()
        .filter_map(|input| match input {
            FnArg::Typed(argument) => Some(&*argument.ty),
            FnArg::Receiver(_) => None,
        })
        .collect();
    let [event, views] = types[..] else { return wrong(signature.inputs.span()) };
    if !ends_with(event, "Event") {
        return wrong(event.span());
    }
    match views {
        Type::Reference(reference) if reference.mutability.is_some() && ends_with(&reference.elem, "Views") => {}
        _ => return wrong(views.span()),
    }
    match signature.output {
        ReturnType::Default => wrong(signature.span()),
        ReturnType::Type(..) => Ok(()),
    }
}

fn ends_with(ty: &Type, name: &str) -> bool {
    matches!(ty, Type::Path(path) if path.path.segments.last().is_some_and(|segment| segment.ident == name))
}
