//! Proves that operators are told which settings hold and why, and that what is logged can be changed while a gateway runs.

use tidegate::rpc::proto::{
    LogLevel, LogLevelRequest, NamespacesRequest, NamespacesResponse, PauseRequest, Setting, SettingSource,
};
use tonic::Code;

use crate::harness::{Gateway, Mode, Setup, client::assert_do_not_come_back, until};

async fn namespaces(gateway: &Gateway, namespace: &str) -> NamespacesResponse {
    let request = NamespacesRequest {
        namespace: namespace.to_owned(),
    };
    gateway.admin().await.namespaces(request).await.unwrap().into_inner()
}

fn setting<'a>(settings: &'a [Setting], name: &str) -> (&'a str, SettingSource, &'a str) {
    let found = settings.iter().find(|setting| setting.name == name);
    let found = found.unwrap_or_else(|| panic!("no {name} in {settings:?}"));
    (&found.value, found.source(), &found.place)
}

#[tokio::test]
async fn each_setting_says_its_value_and_where_that_comes_from() {
    let setup =
        Setup::new().config("[namespace_defaults]\nwrite_mode = \"behind\"\n[namespaces.orders]\nwrite_delay = \"2s\"");
    let gateway = setup.start().await;
    gateway
        .client
        .namespace("sessions")
        .put("a", b"value", Mode::Through)
        .await
        .unwrap();
    let told = namespaces(&gateway, "").await;
    let known: Vec<_> = told
        .namespaces
        .iter()
        .map(|one| (one.namespace.as_str(), one.configured, one.used))
        .collect();
    assert_eq!(known, [("orders", true, false), ("sessions", false, true)]);
    let orders = &told.namespaces[0].settings;
    let (delay, source, place) = setting(orders, "write_delay");
    assert_eq!((delay, source), ("2s", SettingSource::Namespace));
    assert!(place.contains("tidegate.toml:") && place.ends_with(":1"), "{place}");
    let (mode, source, place) = setting(orders, "write_mode");
    assert_eq!((mode, source), ("behind", SettingSource::NamespaceDefaults));
    assert!(place.contains("tidegate.toml:"), "{place}");
    assert_eq!(
        setting(orders, "refresh_threshold"),
        ("0.2", SettingSource::BuiltIn, "")
    );
    assert_eq!(setting(&told.defaults, "write_mode").0, "behind");

    let unknown = namespaces(&gateway, "nobody").await;
    let [one] = &unknown.namespaces[..] else {
        panic!("{unknown:?}")
    };
    assert!(!one.configured && !one.used, "{one:?}");
    assert_eq!(one.settings, told.defaults);
    let request = NamespacesRequest {
        namespace: "Orders".to_owned(),
    };
    let refused = gateway.admin().await.namespaces(request).await.expect_err("none");
    assert_do_not_come_back(&refused, Code::InvalidArgument, "INVALID");
}

#[tokio::test]
async fn what_is_logged_changes_while_the_gateway_runs() {
    let gateway = Setup::new().start().await;
    let ask = async |level: LogLevel, target: &str, reset| {
        let request = LogLevelRequest {
            level: level.into(),
            target: target.to_owned(),
            reset,
        };
        gateway
            .admin()
            .await
            .log_level(request)
            .await
            .map(tonic::Response::into_inner)
    };
    let pause = async |namespace: &str| {
        let request = PauseRequest {
            namespace: namespace.to_owned(),
            unused: true,
        };
        gateway.admin().await.pause(request).await.unwrap();
    };
    let told = ask(LogLevel::Unspecified, "", false).await.unwrap();
    assert_eq!(told.filter, "info");
    assert!(
        told.targets.iter().any(|target| target == "tidegate::queue"),
        "{told:?}"
    );
    assert_eq!(ask(LogLevel::Error, "", false).await.unwrap().filter, "error");
    pause("unsaid").await;
    let filter = ask(LogLevel::Warn, "tidegate::queue", false).await.unwrap().filter;
    assert_eq!(filter, "error,tidegate::queue=warn");
    pause("said").await;
    until("the pause is said", async || !gateway.said("\"said\"").is_empty()).await;
    assert!(gateway.said("\"unsaid\"").is_empty(), "{}", gateway.log());
    assert_eq!(ask(LogLevel::Unspecified, "", true).await.unwrap().filter, "info");

    for (level, target, reset) in [
        (LogLevel::Info, "nobody", false),
        (LogLevel::Unspecified, "sqlx", false),
        (LogLevel::Info, "", true),
    ] {
        let refused = ask(level, target, reset).await.expect_err("makes no sense");
        assert_do_not_come_back(&refused, Code::InvalidArgument, "INVALID");
    }
    assert_eq!(ask(LogLevel::Unspecified, "", false).await.unwrap().filter, "info");
}
