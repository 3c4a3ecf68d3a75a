use proptest::prelude::*;

use super::*;

#[test]
fn the_sample_tells_whole_stories() {
    let mut kit = TestKit::new(orders);
    for line in include_str!("../events.jsonl").lines() {
        kit.try_given([TestEvent::from_cloud_event(line).unwrap()]).unwrap();
    }
    let shown: Vec<_> = kit
        .rows::<Order>()
        .into_iter()
        .map(|o| (o.order_id, o.customer, o.items.len(), o.total_cents, o.payment_status, o.shipping_status))
        .collect();
    let row = |id: &str, customer: &str, items, total, payment, shipping| {
        (id.to_owned(), Some(customer.to_owned()), items, Some(total), payment, shipping)
    };
    assert_eq!(
        shown,
        [
            row("o-1001", "Ada King", 2, 4_800, PaymentStatus::Paid, ShippingStatus::Dispatched),
            row("o-1002", "Grace Hopper", 1, 12_900, PaymentStatus::Paid, ShippingStatus::Pending),
            row("o-1003", "Ada King", 1, 1_250, PaymentStatus::Paid, ShippingStatus::Dispatched),
            row("o-1004", "Alan Turing", 3, 8_030, PaymentStatus::Failed, ShippingStatus::Pending),
            row("o-1005", "Grace Hopper", 1, 2_600, PaymentStatus::Pending, ShippingStatus::Pending),
        ]
    );
    kit.assert_pure();
}

#[test]
fn a_payment_before_its_order_waits_in_the_row() {
    let kit = TestKit::new(orders).given("payments", "PaymentProcessed", json!({ "order_id": "o-1" }));
    let row = kit.row::<Order>("o-1").unwrap();
    assert_eq!((row.payment_status, row.created_at, row.total_cents), (PaymentStatus::Paid, None, None));
}

#[test]
fn the_latest_name_reaches_orders_before_and_after_it() {
    let created = |order: &str| json!({ "order_id": order, "user_id": "u-1", "items": [] });
    let kit = TestKit::new(orders)
        .given("orders", "OrderCreated", created("o-1"))
        .given("users", "UserRegistered", json!({ "user_id": "u-1", "name": "Ada Byron" }))
        .given("users", "UserUpdated", json!({ "user_id": "u-1", "name": "Ada King" }))
        .given("users", "UserUpdated", json!({ "user_id": "u-1", "email": "ada@example.org" }))
        .given("orders", "OrderCreated", created("o-2"));
    for order_id in ["o-1", "o-2"] {
        assert_eq!(kit.row::<Order>(order_id).unwrap().customer.as_deref(), Some("Ada King"), "{order_id}");
    }
}

/// The events of each service, in its own order.
fn services() -> impl Strategy<Value = [Vec<TestEvent>; 4]> {
    let order = |n: u8| format!("o-{}", n % 4);
    let user = |n: u8| format!("u-{}", n % 3);
    let event = |source: &'static str, event_type: &'static str, second: u8, data: serde_json::Value| {
        TestEvent::new(source, event_type, data).time(Timestamp::from_micros(i64::from(second) * 1_000_000))
    };
    let orders = prop::collection::vec((any::<u8>(), any::<u8>()), 0..=4).prop_map(move |all| {
        // An order is created once.
        (0_u8..)
            .zip(all)
            .map(|(n, (by, time))| {
                let items = json!([{ "sku": "tea", "quantity": n, "unit_price_cents": 100 }]);
                event(
                    "orders",
                    "OrderCreated",
                    time,
                    json!({ "order_id": order(n), "user_id": user(by), "items": items }),
                )
            })
            .collect()
    });
    let users = prop::collection::vec((any::<u8>(), any::<u8>(), "[A-C]"), 0..6).prop_map(move |all| {
        all.into_iter()
            .map(|(n, time, name)| event("users", "UserUpdated", time, json!({ "user_id": user(n), "name": name })))
            .collect()
    });
    let payments = prop::collection::vec((any::<u8>(), any::<u8>(), any::<bool>()), 0..6).prop_map(move |all| {
        all.into_iter()
            .map(|(n, time, paid)| {
                let event_type = if paid { "PaymentProcessed" } else { "PaymentFailed" };
                event("payments", event_type, time, json!({ "order_id": order(n) }))
            })
            .collect()
    });
    let shipping = prop::collection::vec((any::<u8>(), any::<u8>()), 0..4).prop_map(move |all| {
        all.into_iter()
            .map(|(n, time)| event("shipping", "ShipmentDispatched", time, json!({ "order_id": order(n) })))
            .collect()
    });
    (orders, users, payments, shipping).prop_map(|(a, b, c, d)| [a, b, c, d])
}

proptest! {
    #[test]
    fn any_interleaving_of_the_services_gives_the_same_rows(
        services in services(),
        choices in prop::collection::vec((0_usize..4, 1_usize..4), 0..40),
    ) {
        let one_after_the_other = TestKit::new(orders).given_all(services.iter().flatten().cloned());

        let mut queues = services.map(Vec::into_iter);
        let mut mixed = TestKit::new(orders);
        for (service, count) in choices {
            mixed = mixed.given_all(queues[service].by_ref().take(count));
        }
        mixed = mixed.given_all(queues.into_iter().flatten());

        prop_assert_eq!(mixed.rows::<Order>(), one_after_the_other.rows::<Order>());
        prop_assert_eq!(mixed.rows::<Customer>(), one_after_the_other.rows::<Customer>());
        prop_assert_eq!(mixed.rows::<CustomerOrder>(), one_after_the_other.rows::<CustomerOrder>());
        mixed.assert_pure();
    }
}
