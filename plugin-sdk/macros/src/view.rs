//! `#[derive(View)]`

use proc_macro2::{Span, TokenStream};
use quote::{quote, quote_spanned};
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream};
use syn::spanned::Spanned;
use syn::{Data, DeriveInput, Error, Fields, Ident, LitStr, Result, Token, Type};

use crate::names::check_column;

struct Column<'a> {
    field: &'a Ident,
    ty: &'a Type,
    name: String,
    key: bool,
}

struct Table {
    name: LitStr,
    /// Each index as the columns it is over.
    indexes: Vec<Vec<IndexColumn>>,
}

/// A column of an index: its name, bare or as a string. Bare names read better; but Clippy takes a name that is in two
/// indexes for a mistake.
struct IndexColumn {
    name: String,
    span: Span,
}

impl Parse for IndexColumn {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        if input.peek(LitStr) {
            let name: LitStr = input.parse()?;
            return Ok(Self { name: name.value(), span: name.span() });
        }
        let name = Ident::parse_any(input)?;
        Ok(Self { name: name.unraw().to_string(), span: name.span() })
    }
}

pub(crate) fn expand(input: &DeriveInput) -> Result<TokenStream> {
    let fields = match &input.data {
        Data::Struct(data) => match &data.fields {
            Fields::Named(fields) => &fields.named,
            _ => return Err(Error::new(input.ident.span(), "a view is a struct with named fields, one a column")),
        },
        _ => return Err(Error::new(input.ident.span(), "a view is a struct, one field a column")),
    };
    if !input.generics.params.is_empty() {
        let why = "a view is one table, so it has no parameters; rows own their values";
        return Err(Error::new(input.generics.span(), why));
    }
    let table = table(input)?;
    let columns = fields.iter().map(column).collect::<Result<Vec<_>>>()?;
    for (i, column) in columns.iter().enumerate() {
        if columns[..i].iter().any(|before| before.name == column.name) {
            return Err(Error::new(column.field.span(), format!("there are two columns `{}`", column.name)));
        }
    }
    if !columns.iter().any(|column| column.key) {
        let why = "a view needs a key: put #[view(key)] on one or more fields that tell its rows apart";
        return Err(Error::new(input.ident.span(), why));
    }
    for index in &table.indexes {
        for (i, IndexColumn { name, span }) in index.iter().enumerate() {
            if !columns.iter().any(|column| column.name == *name) {
                return Err(Error::new(*span, format!("there is no column `{name}`")));
            }
            if index[..i].iter().any(|before| before.name == *name) {
                return Err(Error::new(*span, format!("the index has `{name}` twice")));
            }
        }
    }
    Ok(implement(&input.ident, &table, &columns))
}

fn table(input: &DeriveInput) -> Result<Table> {
    let (mut name, mut indexes) = (None, Vec::new());
    for attribute in input.attrs.iter().filter(|attribute| attribute.path().is_ident("view")) {
        attribute.parse_nested_meta(|meta| {
            if meta.path.is_ident("name") {
                let value: LitStr = meta.value()?.parse()?;
                check_column(&value.value(), &value)?;
                name = Some(value);
                Ok(())
            } else if meta.path.is_ident("index") {
                let content;
                syn::parenthesized!(content in meta.input);
                let index = content.parse_terminated(IndexColumn::parse, Token![,])?;
                if index.is_empty() {
                    return Err(meta.error("an index needs a column: index(column, ...)"));
                }
                indexes.push(index.into_iter().collect());
                Ok(())
            } else {
                Err(meta.error("expected name = \"...\" or index(column, ...)"))
            }
        })?;
    }
    let Some(name) = name else {
        return Err(Error::new(input.ident.span(), "a view needs a name: #[view(name = \"...\")]"));
    };
    Ok(Table { name, indexes })
}

fn column(field: &syn::Field) -> Result<Column<'_>> {
    let ident = field.ident.as_ref().expect("the fields are named");
    let mut column = Column { field: ident, ty: &field.ty, name: ident.unraw().to_string(), key: false };
    let mut renamed = None;
    for attribute in field.attrs.iter().filter(|attribute| attribute.path().is_ident("view")) {
        attribute.parse_nested_meta(|meta| {
            if meta.path.is_ident("key") {
                column.key = true;
                Ok(())
            } else if meta.path.is_ident("column") {
                let value: LitStr = meta.value()?.parse()?;
                column.name = value.value();
                renamed = Some(value);
                Ok(())
            } else {
                Err(meta.error("expected key or column = \"...\""))
            }
        })?;
    }
    match &renamed {
        Some(name) => check_column(&column.name, name)?,
        None => check_column(&column.name, ident)?,
    }
    Ok(column)
}

fn implement(view: &Ident, table: &Table, columns: &[Column<'_>]) -> TokenStream {
    let sdk = quote!(::shadowbox_plugin);
    let Table { name, indexes } = table;
    let (keys, others): (Vec<&Column<'_>>, Vec<&Column<'_>>) = columns.iter().partition(|column| column.key);

    // Every call names the field's type at the field, so that a type without the trait is reported there.
    let column = |column: &Column<'_>| {
        let ty = column.ty;
        quote_spanned!(ty.span()=> <#ty as ::shadowbox_plugin::column::Column>)
    };
    let key_column = |column: &Column<'_>| {
        let ty = column.ty;
        quote_spanned!(ty.span()=> <#ty as ::shadowbox_plugin::column::KeyColumn>)
    };
    let schema = columns.iter().map(|column| {
        let (ty, name) = (column.ty, &column.name);
        quote_spanned!(ty.span()=> ::shadowbox_plugin::view::ColumnSchema::of::<#ty>(#name))
    });
    let key_names = keys.iter().map(|column| &column.name);
    let index_names = indexes.iter().map(|index| {
        let names = index.iter().map(|column| &column.name);
        quote!(&[#(#names),*])
    });

    // One key column is passed as it is, several as a tuple.
    let single = keys.len() == 1;
    let key_types = keys.iter().map(|k| key_column(k)).collect::<Vec<_>>();
    let key_fields = keys.iter().map(|k| k.field).collect::<Vec<_>>();
    let key_type = if single { quote!(#(#key_types::Key<'k>)*) } else { quote!((#(#key_types::Key<'k>,)*)) };
    let key_value = quote!(#(#key_types::as_key(&self.#key_fields)),*);
    let key_value = if single { key_value } else { quote!((#key_value)) };
    let key_pattern = if single { quote!(#(#key_fields)*) } else { quote!((#(#key_fields,)*)) };

    let normalized = columns.iter().map(|c| {
        let (trait_, field) = (column(c), c.field);
        quote!(#trait_::normalize(&mut self.#field);)
    });
    let checked = columns.iter().map(|c| {
        let (trait_, field) = (column(c), c.field);
        quote!(#trait_::check(&self.#field)?;)
    });
    let encoded = others.iter().map(|c| {
        let (trait_, field) = (column(c), c.field);
        quote!(#trait_::encode(&self.#field, out)?;)
    });
    let decoded = |from: TokenStream, columns: &[&Column<'_>]| {
        let fields = columns.iter().map(|c| {
            let (trait_, field) = (column(c), c.field);
            quote!(#field: #trait_::decode(#from)?,)
        });
        quote!(#(#fields)*)
    };
    let (decoded_keys, decoded_others) = (decoded(quote!(key), &keys), decoded(quote!(row), &others));
    // A view may consist of its key alone.
    let (out, row) = if others.is_empty() { (quote!(_out), quote!(_row)) } else { (quote!(out), quote!(row)) };

    quote! {
        #[automatically_derived]
        impl #sdk::View for #view {
            const SCHEMA: #sdk::view::Schema = #sdk::view::Schema {
                name: #name,
                columns: &[#(#schema),*],
                key: &[#(#key_names),*],
                indexes: &[#(#index_names),*],
            };
            type Key<'k> = #key_type;

            fn key(&self) -> Self::Key<'_> {
                #key_value
            }
            fn set_key(&mut self, #key_pattern: Self::Key<'_>) {
                #(self.#key_fields = #key_types::from_key(#key_fields);)*
            }
            fn has_key(&self, #key_pattern: Self::Key<'_>) -> bool {
                #(#key_types::is_key(&self.#key_fields, #key_fields))&&*
            }
            fn hash_key(#key_pattern: Self::Key<'_>, hasher: &mut #sdk::__private::KeyHasher) {
                #(#key_types::hash_key(#key_fields, hasher);)*
            }
            fn encode_key(#key_pattern: Self::Key<'_>, out: &mut ::std::vec::Vec<u8>) {
                #(#key_types::encode_key(#key_fields, out);)*
            }
            fn compare_keys(&self, other: &Self) -> ::core::cmp::Ordering {
                ::core::cmp::Ordering::Equal
                    #(.then_with(|| #key_types::order(&self.#key_fields, &other.#key_fields)))*
            }
            fn normalize(&mut self) {
                #(#normalized)*
            }
            fn check(&self) -> ::core::result::Result<(), #sdk::Error> {
                #(#checked)*
                ::core::result::Result::Ok(())
            }
            fn encode_row(&self, #out: &mut ::std::vec::Vec<u8>) -> ::core::result::Result<(), #sdk::Error> {
                #(#encoded)*
                ::core::result::Result::Ok(())
            }
            fn decode(key: &mut &[u8], #row: &mut &[u8]) -> ::core::result::Result<Self, #sdk::Error> {
                // The parts are read in the order of the braces, which is the order of the encoding.
                ::core::result::Result::Ok(Self { #decoded_keys #decoded_others })
            }
        }
    }
}
