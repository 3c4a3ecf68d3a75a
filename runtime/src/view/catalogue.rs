//! The catalogue: which generations there are, and which one of each projection is live.
//!
//! It is a small database of its own. Which rows are complete to where is not in it: that stands with the rows. So a
//! crash between a generation's last commit and its promotion loses nothing; the promotion is done after the restart.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow};
use sqlx::{Row, SqliteConnection};

use super::{Error, Generation};
use crate::config::{Policy, limits};
use crate::fault;
use crate::manifest::Manifest;
use crate::model::Time;

/// What a generation is to its projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Readers see it.
    Live,
    /// It catches up in the shadow.
    Building,
    /// It was live; kept for a rollback.
    Former,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Live => "live",
            Role::Building => "building",
            Role::Former => "former",
        }
    }
}

/// A generation as the catalogue has it.
#[derive(Clone, Debug)]
pub struct GenerationRecord {
    /// The projection's name.
    pub projection: String,
    /// 1, 2, ... in a projection; never used again.
    pub number: u64,
    /// What it is now.
    pub role: Role,
    /// The hash of the module that builds it.
    pub module: String,
    /// That module's manifest.
    pub manifest: Manifest,
    /// Its file.
    pub file: PathBuf,
    /// When it became live; None if it never was. Later than that of every generation that was live before it.
    pub promoted: Option<Time>,
}

/// All generations of one projection.
#[derive(Clone, Debug)]
pub struct ProjectionRecord {
    /// The projection's name.
    pub name: String,
    /// By number.
    pub generations: Vec<GenerationRecord>,
    /// The hash of the module that was rolled back from and is not to be taken up again.
    pub held: Option<String>,
}

impl ProjectionRecord {
    /// The generation in a role of which there is at most one.
    pub fn role(&self, role: Role) -> Option<&GenerationRecord> {
        self.generations.iter().find(|g| g.role == role)
    }

    /// The former generations, in the order in which they were live.
    pub fn former(&self) -> Vec<&GenerationRecord> {
        let mut former: Vec<_> = self.generations.iter().filter(|g| g.role == Role::Former).collect();
        former.sort_by_key(|g| g.promoted);
        former
    }
}

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS generations (
        projection TEXT NOT NULL, number INTEGER NOT NULL,
        role TEXT NOT NULL CHECK (role IN ('live', 'building', 'former')),
        module TEXT NOT NULL, manifest TEXT NOT NULL, created_at TEXT NOT NULL, promoted_at TEXT,
        PRIMARY KEY (projection, number)) STRICT;
    CREATE UNIQUE INDEX IF NOT EXISTS one_live ON generations (projection) WHERE role = 'live';
    CREATE UNIQUE INDEX IF NOT EXISTS one_building ON generations (projection) WHERE role = 'building';
    -- What somebody said while Shadowbox ran; it wins over the configuration.
    CREATE TABLE IF NOT EXISTS policies (projection TEXT PRIMARY KEY, policy TEXT NOT NULL) STRICT;
    -- A number is never given out twice, not even after its generation is gone: readers tell generations by it.
    CREATE TABLE IF NOT EXISTS numbers (projection TEXT PRIMARY KEY, last INTEGER NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS held (projection TEXT PRIMARY KEY, module TEXT NOT NULL) STRICT;";

/// The catalogue of a data directory. Cheap to clone.
#[derive(Clone)]
pub struct Catalogue {
    data: PathBuf,
    path: PathBuf,
    pool: SqlitePool,
}

impl Catalogue {
    /// Opens the catalogue for the runtime, which is its one writer; creates it if it is not there.
    pub async fn open(data: &Path) -> Result<Catalogue, Error> {
        let (file, views) = (data.join(FILE), data.join("views"));
        let generations = || entries(&views).any(|projection| entries(&projection).any(|file| is_database(&file)));
        if !file.exists() && generations() {
            // A new one would give their numbers out again.
            return Err(Error::NoCatalogue { catalogue: file, views });
        }
        let catalogue = Catalogue::connect(data, SqliteConnectOptions::new().create_if_missing(true)).await?;
        fault::point("catalogue.made", &file.to_string_lossy());
        sqlx::raw_sql(SCHEMA).execute(&catalogue.pool).await.map_err(|e| catalogue.failed(e))?;
        Ok(catalogue)
    }

    /// Opens it for reading, while a runtime runs or not. None if there is none yet.
    pub async fn open_read_only(data: &Path) -> Result<Option<Catalogue>, Error> {
        if !data.join(FILE).exists() {
            return Ok(None);
        }
        Catalogue::connect(data, SqliteConnectOptions::new().read_only(true)).await.map(Some)
    }

    async fn connect(data: &Path, options: SqliteConnectOptions) -> Result<Catalogue, Error> {
        let path = data.join(FILE);
        let options = options
            .filename(&path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(sqlx::sqlite::SqliteSynchronous::Full)
            .busy_timeout(limits::DATABASE_BUSY);
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .connect_with(options)
            .await
            .map_err(|error| Error::Catalogue { path: path.clone(), error })?;
        Ok(Catalogue { data: data.to_owned(), path, pool })
    }

    /// All projections with their generations, by name and number.
    pub async fn projections(&self) -> Result<Vec<ProjectionRecord>, Error> {
        let sql = "SELECT projection, number, role, module, manifest, promoted_at FROM generations
                   ORDER BY projection, number";
        let rows = sqlx::query(sql).fetch_all(&self.pool).await.map_err(|e| self.failed(e))?;
        let mut held = self.held().await?;
        let mut projections: Vec<ProjectionRecord> = Vec::new();
        for row in rows {
            let record = self.record(&row)?;
            match projections.last_mut().filter(|p| p.name == record.projection) {
                Some(projection) => projection.generations.push(record),
                None => {
                    let (name, held) = (record.projection.clone(), held.remove(&record.projection));
                    projections.push(ProjectionRecord { name, generations: vec![record], held });
                }
            }
        }
        Ok(projections)
    }

    /// By projection. A catalogue that nobody has rolled back in may be of a version that could not.
    async fn held(&self) -> Result<HashMap<String, String>, Error> {
        let sql = "SELECT count(*) > 0 FROM sqlite_schema WHERE name = 'held'";
        if !sqlx::query_scalar(sql).fetch_one(&self.pool).await.map_err(|e| self.failed(e))? {
            return Ok(HashMap::new());
        }
        let rows = sqlx::query_as("SELECT projection, module FROM held").fetch_all(&self.pool).await;
        Ok(rows.map_err(|e| self.failed(e))?.into_iter().collect())
    }

    fn record(&self, row: &SqliteRow) -> Result<GenerationRecord, Error> {
        let read = || -> sqlx::Result<GenerationRecord> {
            let (projection, number): (String, i64) = (row.try_get(0)?, row.try_get(1)?);
            let role = match row.try_get::<&str, _>(2)? {
                "live" => Role::Live,
                "building" => Role::Building,
                _ => Role::Former,
            };
            let manifest = Manifest::stored(row.try_get(4)?).map_err(|e| sqlx::Error::Decode(e.into()))?;
            let file = self.file(&projection, number as u64);
            let module = row.try_get(3)?;
            let promoted = row.try_get::<Option<&str>, _>(5)?.map(str::parse).transpose();
            let promoted = promoted.map_err(|e: String| sqlx::Error::Decode(e.into()))?;
            Ok(GenerationRecord { projection, number: number as u64, role, module, manifest, file, promoted })
        };
        read().map_err(|e| self.failed(e))
    }

    /// Where a generation's file is.
    pub fn file(&self, projection: &str, number: u64) -> PathBuf {
        self.data.join("views").join(projection).join(format!("{number}.sqlite"))
    }

    /// Makes the file of a new generation and enters it. The file comes first: one without an entry is a stray, but an
    /// entry without a file could not be told from a view that somebody has removed.
    ///
    /// After an error it may be called again: whatever became of the first call, its generation is forgotten, and
    /// another one made. There must be none in this role that counts.
    pub async fn create(&self, role: Role, module: &str, manifest: &Manifest) -> Result<GenerationRecord, Error> {
        let next = self.last_numbers().await?.get(&manifest.projection).copied().unwrap_or_default() + 1;
        let file = self.file(&manifest.projection, next as u64);
        if file.symlink_metadata().is_ok() {
            let what = "no file of Shadowbox's, but in the way of a new generation; move it elsewhere";
            let error = std::io::Error::new(std::io::ErrorKind::AlreadyExists, what);
            return Err(Error::File { path: file, error });
        }
        let sql = "INSERT INTO numbers VALUES (?, 1) ON CONFLICT DO UPDATE SET last = last + 1 RETURNING last";
        let number = sqlx::query_scalar::<_, i64>(sql).bind(&manifest.projection).fetch_one(&self.pool).await;
        let number = number.map_err(|e| self.failed(e))?;
        let file = self.file(&manifest.projection, number as u64);
        self.fail("generation.numbered", &manifest.projection)?;
        Generation::create(&file, manifest).inspect_err(|_| {
            // Half a file is of no use to anybody. What cannot be removed now is a stray after the next start.
            let _ = remove_database(&file);
        })?;
        self.fail("generation.made", &manifest.projection)?;
        self.clear(&manifest.projection, role).await?;
        let promoted = (role == Role::Live).then(Time::now);
        sqlx::query("INSERT INTO generations VALUES (?, ?, ?, ?, ?, ?, ?)")
            .bind(&manifest.projection)
            .bind(number)
            .bind(role.name())
            .bind(module)
            .bind(&manifest.json)
            .bind(Time::now().to_string())
            .bind(promoted.map(|time| time.to_string()))
            .execute(&self.pool)
            .await
            .map_err(|e| self.failed(e))?;
        fault::point("generation.entered", &manifest.projection);
        Ok(GenerationRecord {
            projection: manifest.projection.clone(),
            number: number as u64,
            role,
            module: module.to_owned(),
            manifest: manifest.clone(),
            file,
            promoted,
        })
    }

    /// Makes the building generation live in one step, and the live one a former one. May be done again after an error,
    /// whether it has happened or not.
    pub async fn promote(&self, projection: &str, number: u64) -> Result<Time, Error> {
        let promote = async {
            fault::fail("promote.begun", projection)?;
            let mut tx = self.pool.begin().await?;
            let connection: &mut SqliteConnection = &mut tx;
            let sql = "SELECT promoted_at FROM generations WHERE projection = ? AND promoted_at IS NOT NULL";
            let before: Vec<String> = sqlx::query_scalar(sql).bind(projection).fetch_all(&mut *connection).await?;
            // A clock that was set back must not change which generation was live last.
            let last = before.iter().filter_map(|time| time.parse::<Time>().ok()).max();
            let next = last.and_then(|last| Time::from_microseconds(last.microseconds() + 1));
            let now = next.map_or_else(Time::now, |next| next.max(Time::now()));
            sqlx::query("UPDATE generations SET role = 'former' WHERE projection = ? AND role = 'live'")
                .bind(projection)
                .execute(&mut *connection)
                .await?;
            let sql = "UPDATE generations SET role = 'live', promoted_at = ? WHERE projection = ? AND number = ?";
            let done = sqlx::query(sql)
                .bind(now.to_string())
                .bind(projection)
                .bind(number as i64)
                .execute(&mut *connection)
                .await?;
            if done.rows_affected() != 1 {
                return Err(sqlx::Error::RowNotFound);
            }
            fault::fail("promote.flipped", projection)?;
            tx.commit().await?;
            fault::fail("promote.done", projection)?;
            Ok(now)
        };
        promote.await.map_err(|e| self.failed(e))
    }

    /// A build that could not be removed when it was given up would be in the way of the next one, and so would a
    /// generation whose entry was committed by a call that only heard of an error; their files are strays from now on.
    /// A former generation on its way back is never given up so.
    async fn clear(&self, projection: &str, role: Role) -> Result<(), Error> {
        let sql = "DELETE FROM generations WHERE projection = ? AND role = ?";
        sqlx::query(sql)
            .bind(projection)
            .bind(role.name())
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(|e| self.failed(e))
    }

    /// Makes a former generation the building one, or that a former one again.
    pub async fn set_role(&self, record: &GenerationRecord, role: Role) -> Result<(), Error> {
        if role == Role::Building {
            self.clear(&record.projection, role).await?;
        }
        sqlx::query("UPDATE generations SET role = ? WHERE projection = ? AND number = ?")
            .bind(role.name())
            .bind(&record.projection)
            .bind(record.number as i64)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(|e| self.failed(e))
    }

    /// Notes which module is not to be taken up again, until another one is in its place.
    pub async fn set_held(&self, projection: &str, module: Option<&str>) -> Result<(), Error> {
        let query = match module {
            Some(module) => sqlx::query("INSERT OR REPLACE INTO held VALUES (?, ?)").bind(projection).bind(module),
            None => sqlx::query("DELETE FROM held WHERE projection = ?").bind(projection),
        };
        query.execute(&self.pool).await.map(drop).map_err(|e| self.failed(e))
    }

    /// The policies that were set while Shadowbox ran, by projection.
    pub async fn policies(&self) -> Result<BTreeMap<String, Policy>, Error> {
        let rows: Vec<(String, String)> = sqlx::query_as("SELECT projection, policy FROM policies")
            .fetch_all(&self.pool)
            .await
            .map_err(|e| self.failed(e))?;
        let parsed = rows.into_iter().map(|(projection, policy)| {
            policy
                .parse()
                .map(|policy| (projection, policy))
                .map_err(|e: String| self.failed(sqlx::Error::Decode(e.into())))
        });
        parsed.collect()
    }

    /// Keeps a projection's policy, or, with None, forgets it.
    pub async fn set_policy(&self, projection: &str, policy: Option<Policy>) -> Result<(), Error> {
        let statement = match policy {
            Some(policy) => sqlx::query("INSERT OR REPLACE INTO policies (projection, policy) VALUES (?, ?)")
                .bind(projection)
                .bind(policy.name()),
            None => sqlx::query("DELETE FROM policies WHERE projection = ?").bind(projection),
        };
        statement.execute(&self.pool).await.map(drop).map_err(|e| self.failed(e))
    }

    /// Notes that another module builds this generation from now on.
    pub async fn set_module(&self, record: &GenerationRecord) -> Result<(), Error> {
        self.fail("swap.noted", &record.projection)?;
        sqlx::query("UPDATE generations SET module = ?, manifest = ? WHERE projection = ? AND number = ?")
            .bind(&record.module)
            .bind(&record.manifest.json)
            .bind(&record.projection)
            .bind(record.number as i64)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(|e| self.failed(e))
    }

    /// Forgets a generation and removes its file. Nobody may write to it any more; readers that have it open finish.
    pub async fn remove(&self, projection: &str, number: u64) -> Result<(), Error> {
        self.fail("remove.begun", projection)?;
        // Never the one that readers see, whatever whoever calls this thinks of it.
        sqlx::query("DELETE FROM generations WHERE projection = ? AND number = ? AND role <> 'live'")
            .bind(projection)
            .bind(number as i64)
            .execute(&self.pool)
            .await
            .map_err(|e| self.failed(e))?;
        let sql = "SELECT count(*) > 0 FROM generations WHERE projection = ? AND number = ?";
        let live = sqlx::query_scalar(sql).bind(projection).bind(number as i64).fetch_one(&self.pool).await;
        if live.map_err(|e| self.failed(e))? {
            return Err(self.failed(sqlx::Error::Protocol(format!("generation {number} is live"))));
        }
        self.fail("remove.forgotten", projection)?;
        remove_database(&self.file(projection, number))
    }

    /// Removes the files of generations that are no more: what a crash in the middle of `create` or `remove` left, be it
    /// only the journal of a database that is gone. A file is ours if a number that was given out is its name. What else
    /// is in the folder is somebody's, a copy say, and is only named in the log.
    pub async fn remove_strays(&self) -> Result<(), Error> {
        let known: HashSet<PathBuf> =
            self.projections().await?.into_iter().flat_map(|p| p.generations).map(|g| g.file).collect();
        let last: HashMap<String, i64> = self.last_numbers().await?;
        // Each once, whatever there is of it.
        let mut strays = BTreeSet::new();
        for folder in entries(&self.data.join("views")) {
            if !folder.is_dir() {
                leave(&folder);
                continue;
            }
            let last = folder.file_name().and_then(|name| last.get(name.to_str()?)).copied().unwrap_or_default();
            for file in entries(&folder) {
                let is_file = file.symlink_metadata().is_ok_and(|metadata| metadata.is_file());
                match database(&file).filter(|database| is_file && number(database).is_some_and(|n| n <= last)) {
                    Some(database) if known.contains(&database) => {}
                    Some(database) => drop(strays.insert(database)),
                    None => leave(&file),
                }
            }
        }
        for file in strays {
            fault::point("start.stray", &file.to_string_lossy());
            tracing::info!(?file, "removing the file of a generation that is no more");
            remove_database(&file)?;
        }
        Ok(())
    }

    /// By projection: the number that was given out last.
    async fn last_numbers(&self) -> Result<HashMap<String, i64>, Error> {
        let rows = sqlx::query_as("SELECT projection, last FROM numbers").fetch_all(&self.pool).await;
        Ok(rows.map_err(|e| self.failed(e))?.into_iter().collect())
    }

    /// Closes the database, so that the file alone is all of it.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    fn fail(&self, point: &'static str, projection: &str) -> Result<(), Error> {
        fault::fail(point, projection).map_err(|error| self.failed(error.into()))
    }

    fn failed(&self, error: sqlx::Error) -> Error {
        Error::Catalogue { path: self.path.clone(), error }
    }
}

const FILE: &str = "catalogue.sqlite";

/// What is in a directory; nothing, if it cannot be read.
fn entries(path: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn is_database(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "sqlite")
}

/// What SQLite has beside a database while it is open, and after a crash.
const BESIDE: [&str; 3] = ["-wal", "-shm", "-journal"];

/// The database that a file is, or is a part of.
fn database(file: &Path) -> Option<PathBuf> {
    let path = file.to_str()?;
    let path = BESIDE.iter().find_map(|suffix| path.strip_suffix(suffix)).unwrap_or(path);
    Some(PathBuf::from(path)).filter(|path| is_database(path))
}

/// The number of the generation that has its database in a file of this name.
fn number(database: &Path) -> Option<i64> {
    let stem = database.file_stem()?.to_str()?;
    stem.parse().ok().filter(|number: &i64| *number > 0 && number.to_string() == stem)
}

fn leave(path: &Path) {
    tracing::warn!(?path, "this is no file of Shadowbox's, and is left alone; keep it elsewhere");
}

/// The database first: without the files beside it, it would pass for an older state of itself.
fn remove_database(file: &Path) -> Result<(), Error> {
    for suffix in [""].into_iter().chain(BESIDE) {
        let mut path = file.as_os_str().to_owned();
        path.push(suffix);
        if suffix == BESIDE[0] {
            fault::point("remove.unlinked", &file.to_string_lossy());
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::File { path: path.into(), error });
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_was_given_out_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(folder.path()).await.unwrap();
        sqlx::raw_sql("INSERT INTO numbers VALUES ('p', 2)").execute(&catalogue.pool).await.unwrap();
        let views = folder.path().join("views");
        let ours = ["p/1.sqlite", "p/1.sqlite-wal", "p/2.sqlite-journal", "p/2.sqlite-shm"];
        let others = [
            "1.sqlite",
            "p/0.sqlite",
            "p/01.sqlite",
            "p/+1.sqlite",
            "p/1 (copy).sqlite",
            "p/1.sqlite.bak",
            "p/3.sqlite",
            "p/3.sqlite-wal",
            "p/backup.sqlite",
            "q/1.sqlite",
        ];
        for folder in ["p", "q"] {
            std::fs::create_dir_all(views.join(folder)).unwrap();
        }
        for file in ours.iter().chain(&others) {
            std::fs::write(views.join(file), "x").unwrap();
        }
        catalogue.remove_strays().await.unwrap();
        for file in ours {
            assert!(!views.join(file).exists(), "{file} was left");
        }
        for file in others {
            assert!(views.join(file).exists(), "{file} was removed");
        }
    }

    #[tokio::test]
    async fn a_file_in_the_way_of_a_new_generation_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(folder.path()).await.unwrap();
        let manifest = Manifest::parse(MANIFEST).unwrap();
        let file = catalogue.file(&manifest.projection, 1);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, "mine").unwrap();
        for _ in 0..2 {
            let refused = catalogue.create(Role::Building, "m", &manifest).await.unwrap_err().to_string();
            assert!(refused.contains("in the way of a new generation; move it elsewhere"), "{refused}");
            assert_eq!(std::fs::read(&file).unwrap(), b"mine");
        }
        std::fs::remove_file(&file).unwrap();
        assert_eq!(catalogue.create(Role::Building, "m", &manifest).await.unwrap().number, 1);
    }

    const MANIFEST: &str = r#"{ "contract": "0.1.0", "projection": "p", "version": 1, "sources": [{ "source": "s" }],
        "views": [{ "name": "a", "columns": [{ "name": "k", "type": "text" }], "key": ["k"] }] }"#;
}
