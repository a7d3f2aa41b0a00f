"""Where joins run: DuckDB in this process, or Spark. Tables are parquet files of one folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from ibis.expr.types import Table


@dataclass(frozen=True)
class Engine:
    """A connection of Ibis, and the folder of its tables."""

    con: Any
    folder: Path
    is_spark: bool

    @classmethod
    def duckdb(cls, folder: Path, connection: "DuckDBPyConnection") -> "Engine":
        import ibis

        connection.execute("SET preserve_insertion_order = false")
        return cls(ibis.duckdb.from_connection(connection), folder, is_spark=False)

    @classmethod
    def spark(cls, folder: Path, memory_gb: float) -> "Engine":
        """The session that spark-defaults.conf describes; without one Spark runs here."""
        import ibis
        from pyspark.sql import SparkSession

        session = (
            SparkSession.builder.appName("rankpo-fast label")
            .config("spark.driver.memory", f"{max(1, round(memory_gb))}g")
            .config("spark.sql.session.timeZone", "UTC")
            .config("spark.ui.showConsoleProgress", "false")
            .getOrCreate()
        )
        return cls(ibis.pyspark.connect(session), folder, is_spark=True)

    def read(self, name: str) -> "Table":
        """The table of a file that `keep`, or the staging of records, has written."""
        path = self.folder / f"{name}.parquet"
        return self.con.read_parquet(str(path), table_name=name)

    def keep(self, table: "Table", name: str) -> "Table":
        """Run it once, write it, and read it from there. A name is written once."""
        self.con.to_parquet(table, self.folder / f"{name}.parquet")
        # DuckDB sums in 128 bits, which parquet holds as doubles: back to what they are
        return self.read(name).cast(dict(table.schema().items()))

    def glob(self, name: str) -> str:
        """The files of a table: Spark writes a folder of them."""
        path = self.folder / f"{name}.parquet"
        return f"{path}/*.parquet" if path.is_dir() else str(path)

    def rows(self, table: "Table") -> list[dict[str, Any]]:
        """Of what is small."""
        return list(self.con.to_pyarrow(table).to_pylist())

    def one(self, value: Any) -> Any:
        return self.con.to_pyarrow(value).as_py()

    def close(self) -> None:
        """Stop Spark; a connection to DuckDB belongs to who made it."""
        if self.is_spark:
            self.con.disconnect()
