//! The projection `{{name}}`: what customers have ordered, and what it came to.

use serde::Deserialize;
use shadowbox_plugin::prelude::*;

/// What goes in: events of the source `orders`, each with its payload.
#[derive(Events)]
#[events(source = "orders")]
enum OrderEvent {
    #[event("OrderPlaced")]
    Placed(OrderPlaced),
}

#[derive(Deserialize)]
struct OrderPlaced {
    customer: String,
    total_cents: i64,
}

/// What comes out: a row of the view `{{view}}`, one for each customer.
#[derive(View, Default)]
#[view(name = "{{view}}")]
struct Customer {
    #[view(key)]
    customer: String,
    orders: i64,
    total_cents: i64,
    last_order_at: Timestamp,
}

/// And how: the rows may depend on nothing but the events, because they are rebuilt from them.
#[projection(name = "{{name}}", version = 1, views(Customer))]
fn projection(event: Event<OrderEvent>, views: &mut Views) -> Result<()> {
    match event.data {
        OrderEvent::Placed(e) => views.upsert::<Customer>(&e.customer, |row| {
            row.orders += 1;
            row.total_cents += e.total_cents;
            row.last_order_at = event.time;
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_add_up() {
        let kit = TestKit::new(projection)
            .given("orders", "OrderPlaced", json!({ "customer": "Ada", "total_cents": 4_800 }))
            .given("orders", "OrderPlaced", json!({ "customer": "Ada", "total_cents": 1_250 }));
        let ada = kit.row::<Customer>("Ada").unwrap();
        assert_eq!((ada.orders, ada.total_cents), (2, 6_050));
        kit.assert_pure();
    }
}
