//! One row an order, from the events of four services: who ordered, what, whether it is paid and whether it is sent.
//!
//! It shows how to join services whose events arrive in any order. A payment may come before the order that it pays,
//! and a customer's name after both; still the rows must not depend on it, or a rebuild would give other ones. Three
//! rules make that so:
//!
//! 1. Every service has columns of its own, which only its events write; each service's own events do come in order.
//!    Whichever event comes first makes the row; what no service has said yet is absent.
//! 2. What several services write is merged by a rule that forgets the order: `updated_at` is the latest time.
//! 3. What must be known later is remembered: `customers` keeps a name for orders to come, and `customer_orders` finds
//!    the orders of a customer whose name changes. One row for each of them, not a list in one row, so that a customer
//!    with a million orders costs no more an order than one with two.

use serde::{Deserialize, Serialize};
use shadowbox_plugin::prelude::*;

#[derive(Events)]
enum Fact {
    #[event("OrderCreated", source = "orders")]
    OrderCreated(OrderCreated),
    #[event("UserRegistered", "UserUpdated", source = "users")]
    User(User),
    #[event("PaymentProcessed", source = "payments")]
    PaymentProcessed(OrderRef),
    #[event("PaymentFailed", source = "payments")]
    PaymentFailed(OrderRef),
    #[event("ShipmentDispatched", source = "shipping")]
    ShipmentDispatched(OrderRef),
}

#[derive(Deserialize)]
struct OrderCreated {
    order_id: String,
    user_id: String,
    items: Vec<Item>,
}

/// Part of an event and part of a row: the column `items` holds them as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Item {
    sku: String,
    quantity: i64,
    unit_price_cents: i64,
}

/// A registration names the user; an update may be about something else.
#[derive(Deserialize)]
struct User {
    user_id: String,
    name: Option<String>,
}

/// All that is needed of the other events: which order they are about.
#[derive(Deserialize)]
struct OrderRef {
    order_id: String,
}

#[derive(TextEnum, Clone, Copy, Debug, Default, PartialEq)]
enum PaymentStatus {
    #[default]
    Pending,
    Paid,
    Failed,
}

#[derive(TextEnum, Clone, Copy, Debug, Default, PartialEq)]
enum ShippingStatus {
    #[default]
    Pending,
    Dispatched,
}

/// A row of the view that all this is for.
#[derive(View, Clone, Debug, Default, PartialEq)]
#[view(name = "orders", index(customer_id))]
struct Order {
    #[view(key)]
    order_id: String,
    customer_id: Option<String>,
    customer: Option<String>,
    items: Json<Vec<Item>>,
    total_cents: Option<i64>,
    payment_status: PaymentStatus,
    shipping_status: ShippingStatus,
    created_at: Option<Timestamp>,
    /// The latest time of all events that this row shows.
    updated_at: Timestamp,
}

/// What is known of a user, and how many orders are theirs.
#[derive(View, Clone, Debug, Default, PartialEq)]
#[view(name = "customers")]
struct Customer {
    #[view(key)]
    user_id: String,
    name: Option<String>,
    named_at: Option<Timestamp>,
    orders: i64,
}

/// The orders of a user, numbered from 1.
#[derive(View, Clone, Debug, PartialEq)]
#[view(name = "customer_orders")]
struct CustomerOrder {
    #[view(key)]
    user_id: String,
    #[view(key)]
    number: i64,
    order_id: String,
}

#[projection(name = "orders-across-services", version = 1, views(Order, Customer, CustomerOrder))]
fn orders(event: Event<Fact>, views: &mut Views) -> Result<()> {
    let at = event.time;
    match event.data {
        Fact::OrderCreated(e) => create(views, e, at),
        Fact::User(User { user_id, name: Some(name) }) => rename(views, &user_id, &name, at),
        Fact::User(_) => Ok(()),
        Fact::PaymentProcessed(e) => change(views, &e.order_id, at, |order| order.payment_status = PaymentStatus::Paid),
        Fact::PaymentFailed(e) => change(views, &e.order_id, at, |order| order.payment_status = PaymentStatus::Failed),
        Fact::ShipmentDispatched(e) => {
            change(views, &e.order_id, at, |order| order.shipping_status = ShippingStatus::Dispatched)
        }
    }
}

/// Changes an order, whether it has been created yet or not.
fn change(views: &mut Views, order_id: &str, at: Timestamp, change: impl FnOnce(&mut Order)) -> Result<()> {
    views.upsert::<Order>(order_id, |order| {
        change(order);
        order.updated_at = order.updated_at.max(at);
    })
}

fn create(views: &mut Views, e: OrderCreated, at: Timestamp) -> Result<()> {
    let customer = views.get::<Customer>(&e.user_id).cloned().unwrap_or_default();
    let number = customer.orders + 1;
    views.upsert::<Customer>(&e.user_id, |customer| customer.orders = number)?;
    views.put(CustomerOrder { user_id: e.user_id.clone(), number, order_id: e.order_id.clone() })?;
    // A name that was there first counts as news all the same: it would if it came second.
    let latest = customer.named_at.map_or(at, |named_at| named_at.max(at));
    change(views, &e.order_id, latest, |order| {
        order.customer_id = Some(e.user_id);
        order.customer = customer.name;
        order.total_cents = Some(e.items.iter().map(|item| item.quantity * item.unit_price_cents).sum());
        order.items = Json(e.items);
        order.created_at = Some(at);
    })
}

/// Gives a user a name, and all orders of theirs.
fn rename(views: &mut Views, user_id: &str, name: &str, at: Timestamp) -> Result<()> {
    let mut orders = 0;
    views.upsert::<Customer>(user_id, |customer| {
        customer.name = Some(name.to_owned());
        customer.named_at = customer.named_at.max(Some(at));
        orders = customer.orders;
    })?;
    // Two calls to the host for all of the orders, instead of two for each.
    views.load::<CustomerOrder>((1..=orders).map(|number| (user_id, number)));
    let order_ids: Vec<String> = (1..=orders)
        .filter_map(|number| views.get::<CustomerOrder>((user_id, number)).map(|order| order.order_id.clone()))
        .collect();
    views.load::<Order>(order_ids.iter().map(String::as_str));
    for order_id in &order_ids {
        change(views, order_id, at, |order| order.customer = Some(name.to_owned()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
