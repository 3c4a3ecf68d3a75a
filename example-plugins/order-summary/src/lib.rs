//! One row an order: who ordered, how much, and how far it has come.
//!
//! The smallest projection that is of use, and where to begin reading. It shows the three parts every projection has:
//! the events that go in, the rows that come out, and one function between them.

use serde::Deserialize;
use shadowbox_plugin::prelude::*;

/// The events of the source `orders`, each with its payload.
#[derive(Events)]
#[events(source = "orders")]
enum OrderEvent {
    #[event("OrderCreated")]
    Created(OrderCreated),
    #[event("OrderLineAdded")]
    LineAdded(OrderLineAdded),
    #[event("OrderPlaced")]
    Placed(OrderRef),
    #[event("OrderCancelled")]
    Cancelled(OrderRef),
}

#[derive(Deserialize)]
struct OrderCreated {
    order_id: String,
    customer: String,
}

#[derive(Deserialize)]
struct OrderLineAdded {
    order_id: String,
    quantity: i64,
    unit_price_cents: i64,
}

/// All that the later events say. Fields that a struct does not name are ignored, so it serves for both.
#[derive(Deserialize)]
struct OrderRef {
    order_id: String,
}

#[derive(TextEnum, Clone, Copy, Debug, Default, PartialEq)]
enum Status {
    #[default]
    Open,
    Placed,
    Cancelled,
}

/// A row of the view `order_summary`.
#[derive(View, Default)]
#[view(name = "order_summary", index(status, updated_at))]
struct OrderSummary {
    #[view(key)]
    order_id: String,
    customer: String,
    status: Status,
    lines: i64,
    total_cents: i64,
    created_at: Timestamp,
    updated_at: Timestamp,
}

#[projection(name = "order-summary", version = 1, views(OrderSummary))]
fn order_summary(event: Event<OrderEvent>, views: &mut Views) -> Result<()> {
    let at = event.time;
    match event.data {
        OrderEvent::Created(e) => views.put(OrderSummary {
            order_id: e.order_id,
            customer: e.customer,
            created_at: at,
            updated_at: at,
            ..Default::default()
        }),
        OrderEvent::LineAdded(e) => change(views, &e.order_id, at, |order| {
            order.lines += 1;
            order.total_cents += e.quantity * e.unit_price_cents;
        }),
        OrderEvent::Placed(e) => change(views, &e.order_id, at, |order| order.status = Status::Placed),
        OrderEvent::Cancelled(e) => change(views, &e.order_id, at, |order| order.status = Status::Cancelled),
    }
}

/// Changes an order that must be there: its own log tells its story in order, so a missing one means lost events.
fn change(views: &mut Views, order_id: &str, at: Timestamp, change: impl FnOnce(&mut OrderSummary)) -> Result<()> {
    let found = views.update::<OrderSummary>(order_id, |order| {
        change(order);
        order.updated_at = at;
    });
    ensure!(found, "order `{order_id}` was never created");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn created() -> TestKit<order_summary> {
        TestKit::new(order_summary).given("orders", "OrderCreated", json!({ "order_id": "o-1", "customer": "Ada" }))
    }

    #[test]
    fn an_order_adds_up() {
        let tea = json!({ "order_id": "o-1", "sku": "tea", "quantity": 2, "unit_price_cents": 450 });
        let pot = json!({ "order_id": "o-1", "sku": "pot", "quantity": 1, "unit_price_cents": 3_900 });
        let kit = created().given("orders", "OrderLineAdded", tea).given("orders", "OrderLineAdded", pot).given(
            "orders",
            "OrderPlaced",
            json!({ "order_id": "o-1" }),
        );
        let order = kit.row::<OrderSummary>("o-1").unwrap();
        assert_eq!((order.customer.as_str(), order.lines, order.total_cents), ("Ada", 2, 4_800));
        assert_eq!(order.status, Status::Placed);
        assert!(order.updated_at > order.created_at);
        kit.assert_pure();
    }

    #[test]
    fn a_cancelled_order_stays_as_a_row() {
        let kit = created().given("orders", "OrderCancelled", json!({ "order_id": "o-1", "reason": "too slow" }));
        assert_eq!(kit.row::<OrderSummary>("o-1").unwrap().status, Status::Cancelled);
    }

    #[test]
    fn a_change_to_an_unknown_order_is_refused() {
        let kit = created().given_failing("orders", "OrderPlaced", json!({ "order_id": "o-2" }), "never created");
        assert_eq!(kit.rows::<OrderSummary>().len(), 1);
    }

    #[test]
    fn other_events_of_the_source_are_not_for_us() {
        let kit = created().given("orders", "OrderArchived", json!({}));
        assert_eq!(kit.rows::<OrderSummary>().len(), 1);
    }
}
