//! Proves that the operators' port is a port of its own: what it serves, what it refuses, and that it stays out of the other's way.

mod commands;
mod drain;
mod letters;
mod settings;

use tidegate::rpc::proto::{GetRequest, StatsRequest, admin_client::AdminClient, gateway_client::GatewayClient};
use tokio::net::TcpStream;
use tonic::{Code, transport::Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::harness::{
    SOON, Setup, client, eventually, expect, until,
    wire::{Wire, frame},
};

#[tokio::test]
async fn each_port_serves_its_own_service_and_health() {
    let gateway = Setup::new().start().await;
    gateway.admin().await.stats(StatsRequest::default()).await.unwrap();
    let elsewhere = AdminClient::new(gateway.channel()).stats(StatsRequest::default()).await;
    assert_eq!(elsewhere.expect_err("not there").code(), Code::Unimplemented);

    let operators = Endpoint::from_shared(format!("http://{}", gateway.admin))
        .unwrap()
        .connect()
        .await
        .unwrap();
    let elsewhere = GatewayClient::new(operators.clone()).get(GetRequest::default()).await;
    assert_eq!(elsewhere.expect_err("not there").code(), Code::Unimplemented);
    for service in ["", "tidegate.v1.Gateway", "tidegate.store"] {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let answer = HealthClient::new(operators.clone()).check(request).await.unwrap();
        assert_eq!(answer.into_inner().status(), ServingStatus::Serving, "{service:?}");
    }
}

#[tokio::test]
async fn each_port_lists_what_it_serves() {
    let gateway = Setup::new().start().await;
    for (address, own, other) in [
        (gateway.admin, "tidegate.v1.Admin", "tidegate.v1.Gateway"),
        (gateway.address, "tidegate.v1.Gateway", "tidegate.v1.Admin"),
    ] {
        let wire = Wire::connect(address).await;
        for version in ["v1", "v1alpha"] {
            let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
            // Field 7, `list_services`, empty.
            let answer = wire.call(&path, &[], frame(0, 2, &[0x3a, 0x00])).await;
            assert_eq!(answer.code(), Some(Code::Ok), "{answer:?}");
            let body = String::from_utf8_lossy(&answer.body).into_owned();
            let itself = format!("grpc.reflection.{version}.ServerReflection");
            for service in [own, "grpc.health.v1.Health", &itself] {
                assert!(body.contains(service), "{service} is not in {body:?}");
            }
            assert!(!body.contains(other), "{other} is in {body:?}");
        }
    }
}

#[tokio::test]
async fn bad_requests_name_their_fields_and_break_nothing() {
    let gateway = Setup::new().start().await;
    for namespace in ["Orders", "a b", "(others)", &"a".repeat(64)] {
        let request = StatsRequest {
            namespace: namespace.to_owned(),
        };
        let status = gateway.admin().await.stats(request).await.expect_err("no namespace");
        client::assert_do_not_come_back(&status, Code::InvalidArgument, "INVALID");
        assert!(status.message().contains("namespace"), "{status:?}");
    }
    let wire = Wire::connect(gateway.admin).await;
    let stats = "/tidegate.v1.Admin/Stats";
    let garbage = wire.call(stats, &[], frame(0, 3, &[0x0a, 0x7f, 0x00])).await;
    assert_eq!(garbage.code(), Some(Code::InvalidArgument), "{garbage:?}");
    let short = wire.call(stats, &[("grpc-timeout", "100m")], frame(0, 100, b"x")).await;
    assert_eq!(short.code(), Some(Code::InvalidArgument), "{short:?}");
    let endless = vec![b'a'; 3 * 1024 * 1024];
    let large = wire.call(stats, &[], frame(0, endless.len(), &endless)).await;
    assert_eq!(large.code(), Some(Code::ResourceExhausted), "{large:?}");
    for (path, code) in [
        ("/tidegate.v1.Admin/Nothing", Code::Unimplemented),
        ("/nobody/Stats", Code::Unimplemented),
        ("/", Code::Unimplemented),
    ] {
        assert_eq!(
            wire.call(path, &[], frame(0, 0, b"")).await.code(),
            Some(code),
            "{path}"
        );
    }
    let web = wire
        .call(stats, &[("content-type", "application/json")], frame(0, 0, b""))
        .await;
    assert_eq!(web.http_status, 415, "{web:?}");
    gateway.admin().await.stats(StatsRequest::default()).await.unwrap();
}

#[tokio::test]
async fn connections_are_bounded_and_room_comes_back() {
    let gateway = Setup::new().start().await;
    let mut idle = Vec::new();
    for _ in 0..16 {
        idle.push(TcpStream::connect(gateway.admin).await.unwrap());
    }
    eventually("one more is refused", SOON, async || {
        idle.push(TcpStream::connect(gateway.admin).await.unwrap());
        let said = gateway.said("refused a connection of an operator");
        expect(!said.is_empty(), idle.len())
    })
    .await;
    drop(idle);
    until("there is room again", async || {
        let Ok(channel) = Endpoint::from_shared(format!("http://{}", gateway.admin))
            .unwrap()
            .connect()
            .await
        else {
            return false;
        };
        AdminClient::new(channel).stats(StatsRequest::default()).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn a_port_that_is_taken_ends_the_start() {
    let gateway = Setup::new().start().await;
    let taken = format!("[admin]\nlisten = \"{}\"", gateway.admin);
    let exit = Setup::new().config(&taken).run_to_end().await;
    assert_eq!(exit.code, Some(69), "{exit:?}");
    assert!(exit.log.contains(&gateway.admin.to_string()), "{exit:?}");
}
