//! What gateways stand on in a test: the kinds of store and cache that a promise has to hold on.

use super::{Client, Database, Gateway, Setup, proxy::Proxy, redis};

/// A store, perhaps with a Redis, for gateways of one configuration.
pub struct Stage {
    pub database: Database,
    redis: Option<redis::Server>,
    config: String,
}

impl Stage {
    /// One gateway over SQLite.
    pub async fn sqlite() -> Stage {
        Stage::over(Database::sqlite(), None)
    }

    /// Gateways over PostgreSQL, which know of each other only by that.
    pub async fn postgres() -> Stage {
        Stage::over(Database::postgres().await, None)
    }

    /// Gateways over PostgreSQL that share a Redis.
    pub async fn postgres_and_redis() -> Stage {
        let (database, redis) = tokio::join!(Database::postgres(), redis::start());
        // A busy machine is no outage of Redis.
        Stage::over(database, Some(redis)).config("[redis]\ntimeout = \"5s\"")
    }

    fn over(database: Database, redis: Option<redis::Server>) -> Stage {
        Stage {
            database,
            redis,
            config: String::new(),
        }
    }

    /// Adds sections to the configuration of its gateways.
    pub fn config(mut self, sections: &str) -> Stage {
        self.config.push_str(sections);
        self.config.push('\n');
        self
    }

    /// Whether it is of PostgreSQL, which a test can hold.
    pub fn is_postgres(&self) -> bool {
        !self.database.url().starts_with("sqlite:")
    }

    /// Whether gateways share a Redis.
    pub fn is_shared(&self) -> bool {
        self.redis.is_some()
    }

    fn setup(&self, store: &str) -> Setup {
        let setup = Setup::new().store(store).config(&self.config);
        match &self.redis {
            Some(redis) => setup.redis(&redis.url()),
            None => setup,
        }
    }

    /// Starts a gateway.
    pub async fn start(&self) -> Gateway {
        self.setup(self.database.url()).start().await
    }

    /// Starts a gateway that reaches the store over a network of its own.
    pub async fn start_far(&self) -> (Gateway, Proxy) {
        let (proxy, url) = Proxy::before(self.database.url()).await;
        (self.setup(&url).start().await, proxy)
    }

    /// Starts as many gateways as it takes: two, or one on a store that takes no more.
    pub async fn start_all(&self) -> Vec<Gateway> {
        if self.is_postgres() {
            let (first, second) = tokio::join!(self.start(), self.start());
            vec![first, second]
        } else {
            vec![self.start().await]
        }
    }
}

/// So many clients, of these gateways in turn.
pub fn clients(gateways: &[Gateway], count: usize) -> Vec<Client> {
    let turns = gateways.iter().cycle().take(count);
    turns.map(|gateway| gateway.client.clone()).collect()
}

/// Makes of each `async fn(Stage)` a test on every kind of stage.
#[allow(unused_macros, reason = "other targets share the harness, and choose their stage")]
macro_rules! on_every_stage {
    ($($test:ident)*) => {
        mod sqlite {
            $(
                #[tokio::test]
                async fn $test() {
                    super::$test($crate::harness::stage::Stage::sqlite().await).await;
                }
            )*
        }

        mod postgres {
            $(
                #[tokio::test]
                async fn $test() {
                    super::$test($crate::harness::stage::Stage::postgres().await).await;
                }
            )*
        }

        mod postgres_and_redis {
            $(
                #[tokio::test]
                async fn $test() {
                    super::$test($crate::harness::stage::Stage::postgres_and_redis().await).await;
                }
            )*
        }
    };
}
pub(crate) use on_every_stage;
